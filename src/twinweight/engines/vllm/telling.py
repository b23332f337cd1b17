"""What a worker tells of its twins: the line of a start-up, what `/metrics` shows, a report for tests and support."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twinweight import paths
from twinweight.engines.vllm import build, compat, heads
from twinweight.engines.vllm.kinds import kind_of
from twinweight.engines.vllm.offers import twin_of
from twinweight.measured import Costs
from twinweight.paths import Path, Route
from twinweight.plan import GIB, MARGIN
from twinweight.workload import Workload

if TYPE_CHECKING:
    from twinweight.engines.vllm.life import Life

log = logging.getLogger("vllm.twinweight")


def start_up(life: Life, available: int, *, fixed: bool) -> None:
    """The one line of a start-up. available: bytes of the KV cache; fixed: whether the user gave them."""
    planned = {**life.plan.twins, **life.plan.missed}
    held, wanted, freed = _bytes(life), sum(o.nbytes for o in planned.values()), _freed(life)
    tokens = ""
    if life.floor.per_token:
        with_, without = available / life.floor.per_token, (available + (0 if fixed else held - freed)) / life.floor.per_token
        tokens = f"; KV cache {int(with_)} tokens, {int(without)} without twins, floor {life.floor.tokens}"
    by_kind = "; ".join(f"{kind}: {route}" for kind, route in routes(life).items()) or "no W4A16 layer"
    log.info(
        "Twinweight %s: %s built, %d missed, %.3f of %.3f GiB a rank%s%s%s; measured in %.1f s, built in %.1f s; %s",
        life.config.mode, built(life), len(planned) - len(life.built), held / GIB, wanted / GIB,
        f", {freed / GIB:.3f} GiB of vLLM's int4 weights freed" if freed else "", tokens,
        _gain(life), *life.seconds, by_kind,
    )  # fmt: skip
    if life.plan.missed:
        budget = life.plan.budget
        log.info("Twinweight: not all twins fit\n%s\n%s", budget.arithmetic(wanted), budget.levers(wanted))


def without_copies(life: Life, lost: Mapping[str, str]) -> None:
    """Layers that cannot have own copies, and why. There may be thousands."""
    counts = Counter((str(kind_of(life.kernels[name])), why) for name, why in lost.items())
    reasons = (f"{count} of {kind} ({why})" for (kind, why), count in counts.items())
    log.warning("Twinweight: layers without own int4 copies: %s", "; ".join(reasons))


def built(life: Life) -> str:
    """How many twins and copies there are."""
    twins, copies = _counts(life)
    return f"{twins} twins and {copies} int4 copies" if copies else f"{twins} twins"


def _counts(life: Life) -> tuple[int, int]:
    """Layers with a twin, and with an int4 copy."""
    kernels = [life.kernels[name] for name in life.built]
    return sum(k.twin is not None for k in kernels), sum(k.own is not None for k in kernels)


def _bytes(life: Life) -> int:
    return sum(b.nbytes for b in life.built.values())


def _freed(life: Life) -> int:
    return sum(kernel.freed for kernel in life.kernels.values())


def _gain(life: Life) -> str:
    """What the twins save in a step of prefill, by the times that were measured; nothing where none were."""
    rows = max(m for m, _ in life.workload.calls)
    step, without, with_ = Workload.prefill(rows), 0.0, 0.0
    for name, kernel in life.kernels.items():
        offer = life.offers[kind_of(kernel)]
        if not isinstance(offer, Costs):
            return ""
        without += offer.seconds(None, step)
        form = life.built[name].form if name in life.built else None
        with_ += offer.seconds(next((f for f in offer.forms if f.name == form), None), step)
    if not without:
        return ""
    if not life.plan.twins and not life.plan.missed:
        return f"; no twins: {life.plan.refused or f'none saves {MARGIN:.0%} of the calls that it would serve'}"
    more = f"; {life.plan.refused}" if life.plan.refused else ""
    return f"; W4A16 layers of a step of {rows} tokens {without * 1e3:.1f} -> {with_ * 1e3:.1f} ms{more}"


def routes(life: Life) -> dict[str, str]:
    """Which rows take which path, by kind of layer; where only some of a kind have a twin, theirs."""
    found = {str(kind_of(k)): Route.always(Path.INT4) for k in life.kernels.values()}
    for name in life.built:
        flat = life.kernels[name].route
        found[str(kind_of(life.kernels[name]))] = Route(tuple(flat[::2]), tuple(Path(p) for p in flat[1::2]))
    return {kind: str(route) for kind, route in found.items()}


def status(life: Life) -> dict[str, Any]:
    """What `/metrics` shows of this worker."""
    planned, held = {**life.plan.twins, **life.plan.missed}, _bytes(life)
    more = max(0, held - _freed(life))
    calls: dict[str, dict[str, int]] = {}
    for (path, rows), count in sorted(paths.calls.copy().items()):
        calls.setdefault(Path(path).name.lower(), {})[str(rows)] = count
    tokens = 0 if life.kv_fixed or not life.floor.per_token else int(more / life.floor.per_token)
    twins, copies = _counts(life)
    missed = len(planned) - len(life.built)
    return {"twins": twins, "copies": copies, "missed": missed, "bytes": more, "kv_tokens": tokens, "calls": calls}


def report(life: Life, check: bool = False) -> str:
    """JSON: twins by name (dtype, address, with `check` whether it is exact), own copies, calls by path, inner kernels,
    routes, output heads on CPUs (whether a single row goes without oneDNN).
    """
    with compat.forward_context(life.worker):
        twins = {
            name: {
                "dtype": twin_of(life.built[name].form),
                "address": t.data_ptr(),
                "exact": build.is_exact(life.kernels[name]) if check and life.kernels[name].twin_scales is None else None,
            }
            for name in life.built
            if (t := life.kernels[name].twin) is not None
        }
    calls = {f"{Path(path).name.lower()}@{m}": count for (path, m), count in sorted(paths.calls.items())}
    inner = {name: type(k.inner).__name__ for name, k in life.kernels.items()}
    return json.dumps({
        "twins": twins, "copies": _counts(life)[1], "bytes": _bytes(life), "freed": _freed(life), "calls": calls,
        "inner": inner, "routes": routes(life), "kv_floor": life.floor.tokens, "heads": heads.chosen(heads.of(life.worker)),
    })  # fmt: skip
