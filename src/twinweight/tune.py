"""`twinweight tune`: measure a model's shapes into the cache ahead of time, and check how good the choices are."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from twinweight import cache
from twinweight.crossover import Crossovers, Shape, by_graphs, choices_of, variants
from twinweight.engines.hf import describe
from twinweight.measured import Costs, Form, Measured
from twinweight.search import time_rows
from twinweight.twins import costs_of
from twinweight.workload import Workload

_STEPS = 4  # sizes that a check times between one power of two and the next
_SAMPLES, _PATIENCE = 64, 0.1  # of a size and path, and seconds for them: short calls wait for the host, which varies
_SUSPECT, _AGAIN = 1.03, 3  # a point with more regret is timed again, so often: what disturbs a call only adds time


def tune(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    check: bool = False,
    workload: Workload | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every distinct shape of a checkpoint anew, into the cache; with `check`, also the regret of the routes.

    Returns {"device", "cache", "seconds", "shapes": [{"n", "k", "count", "routes", "points": [{"m", "us", "winner"}], ...}]},
    with `check` also {"regret": {"geomean", "worst"}, "points": [...]}. Raises what `load` raises for a bad checkpoint.
    """
    counts = Counter(describe(model, device).shapes.values())
    crossovers = Crossovers()
    rows, points = [], []
    started = time.perf_counter()
    crossovers.compile(counts)
    for i, (shape, count) in enumerate(counts.items(), 1):
        step(f"{shape.n} x {shape.k} ({i} of {len(counts)})")
        crossovers.measure(shape)
        rows.append(_row(costs_of(shape, crossovers), shape, count, workload or Workload.prefill()))
    seconds = time.perf_counter() - started
    for shape in counts if check else ():
        step(f"checking {shape.n} x {shape.k}")
        points += check_shape(shape, costs_of(shape, crossovers), workload or Workload.prefill())
    store = crossovers.store
    timed = [shape for shape in counts if len(crossovers.measured[shape].times) > 1]
    if store is not None and not all(store.read(shape.key, shape.device) for shape in timed):
        store = None  # the directory cannot be written, as messages have said
    where = next(iter(counts)).device if counts else torch.device("cpu")
    result: dict[str, Any] = {
        "model": str(model), "device": cache.describe(where), "cache": str(store.directory) if store else None, "seconds":
        round(seconds, 2), "shapes": rows,
    }  # fmt: skip
    return {**result, "regret": regret(points), "points": points} if check else result


def _row(costs: Costs, shape: Shape, count: int, workload: Workload) -> dict[str, Any]:
    """One shape as data. Times are those of the whole weight, though a slice of it may have been timed."""
    measured = costs.measured
    factor = shape.n / measured.n * 1e6
    points = []
    for i, m in enumerate(measured.ms):
        us = {c: round(ts[i].min * factor, 3) for c, ts in measured.times.items()}
        points.append({"m": m, "us": us, "winner": min(us, key=lambda c: us[c])})
    return {
        "n": shape.n, "k": shape.k, "group_size": shape.group_size, "symmetric": shape.symmetric, "act_order":
        shape.act_order, "dtype": str(shape.dtype).removeprefix("torch."), "count": count, "timed_features": measured.n,
        "routes": {f.name: str(costs.route(f)) for f in (costs.base, *costs.forms)},
        "takeovers": {f.name: list(costs.route(f).starts[1:]) for f in (costs.base, *costs.forms)},
        "saved_us": {o.name: round(o.saved_us, 3) for o in costs.options(workload)}, "points": points,
    }  # fmt: skip


# --- regret ---


def check_shape(shape: Shape, costs: Costs, workload: Workload) -> list[dict[str, Any]]:
    """Time the whole weight on a finer grid, and compare what the routes take with the best there is.

    Two routes: without a twin, and with the twin that saves most. The least sample stands for a path.
    Returns [{"n", "k", "form", "m", "chosen", "best", "regret", "us"}].
    """
    forms = [costs.base]
    if best := max(costs.options(workload), key=lambda o: o.saved_us, default=None):
        forms += [f for f in costs.forms if f.name == best.name and best.saved_us > 0]
    names = [c for c in choices_of(shape) if any(c in f.choices for f in forms)]
    ways, wraps = variants(shape, shape.n, names), by_graphs(shape)
    points = []
    for m in finer(costs.measured):
        times = dict.fromkeys(names, math.inf)
        for _ in range(1 + _AGAIN):
            now = time_rows(
                ways, m, shape.k, shape.dtype, shape.device, wrap=wraps(m), enough=_SAMPLES, patience=_PATIENCE
            )  # fmt: skip
            times = {c: min(times[c], t.min) for c, t in now.items()}
            found = [_point(shape, form, m, costs.measured, times) for form in forms if len(form.choices) > 1]
            if all(p["regret"] <= _SUSPECT for p in found):
                break
        points += found
    return points


def finer(measured: Measured) -> list[int]:
    """Sizes from 1 to the largest measured, four to a power of two."""
    most = math.log2(measured.ms[-1])
    return sorted({round(2 ** (i / _STEPS)) for i in range(int(most * _STEPS) + 1)})


def _point(shape: Shape, form: Form, m: int, measured: Measured, times: dict[str, float]) -> dict[str, Any]:
    chosen = next(c for start, c in reversed(measured.pieces(form.choices)) if start <= m)
    best = min(form.choices, key=lambda c: times[c])
    return {
        "n": shape.n, "k": shape.k, "form": form.name, "m": m, "chosen": chosen, "best": best,
        "regret": round(times[chosen] / times[best], 4), "us": {c: round(times[c] * 1e6, 3) for c in form.choices},
    }  # fmt: skip


def regret(points: Iterable[dict[str, Any]]) -> dict[str, float]:
    """{"geomean", "worst"} of the points' regrets; 1 where there are none."""
    found = [p["regret"] for p in points]
    mean = math.exp(math.fsum(map(math.log, found)) / len(found)) if found else 1.0
    return {"geomean": round(mean, 4), "worst": max(found, default=1.0)}
