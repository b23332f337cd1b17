"""Products of many rows on a rested GPU and on one that is busy: at its power limit the order of the paths is another.

    python benchmarks/gpu_load.py OUT.json [--model llama-3.1-8b] [--rows 2048 8192] [--peers machete] [--seconds 0.8]

Writes {"environment", "records": [{"model", "n", "k", "m", "path", "rested_us", "loaded_us": the median of the second half of
SECONDS without a rest, "by_ms": [[milliseconds since the GPU rested, time_us], ...]}], "layers": [{"model", "m", "chosen": "one
path" or the times that chose the paths, "paths", "us": all linears of a layer, again and again for SECONDS}]}. bf16, symmetric
groups of 128, random data; a call is launched alone, behind the one before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_paths import KINDS, LINEARS, Shape, linears, random_weight
from gpu_peers import available
from gpu_timing import environment
from torch import Tensor

from twinweight.search import time_rows
from twinweight.timing import in_turn

Product = Callable[[Tensor], object]
PATHS = ("fused", "stream", "twin")
WINDOWS_MS = (5, 10, 25, 50, 100, 150, 200, 300, 400, 600, 800)
REST_S, AT_ONCE = 0.3, 4  # seconds without work before a run, and calls that are launched ahead


def back_to_back(call: Callable[[], object], seconds: float) -> list[tuple[float, float]]:
    """(milliseconds since the start, microseconds of the call) of calls without a rest."""
    torch.cuda.synchronize()
    time.sleep(REST_S)
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        call()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        if len(events) > AT_ONCE:
            events[-AT_ONCE].synchronize()
    torch.cuda.synchronize()
    return [(events[0].elapsed_time(b), a.elapsed_time(b) * 1e3) for a, b in itertools.pairwise(events)]


def settled(samples: Sequence[tuple[float, float]]) -> float:
    """The median of the second half, by time."""
    half = samples[-1][0] / 2
    return round(statistics.median(us for at, us in samples if at > half), 2)


def by_window(samples: Sequence[tuple[float, float]]) -> list[list[float]]:
    """The medians of what ended in each window."""
    found = []
    for low, high in itertools.pairwise((0, *WINDOWS_MS)):
        inside = [us for at, us in samples if low < at <= high]
        found += [[high, round(statistics.median(inside), 2)]] if inside else []
    return found


def turns_of(model: str, peers: list[str]) -> dict[tuple[int, int], dict[str, Product]]:
    """(n, k) -> path -> the product, on one copy of the weight after the other."""
    found: dict[tuple[int, int], dict[str, Product]] = {}
    for n, k in LINEARS[model]:
        copies = linears(Shape(model, n, k, *KINDS[0]), peers, most=4)
        found[n, k] = {path: in_turn(copies[path]) for path in (*PATHS, *peers)}
    return found


def layer(
    products: dict[tuple[int, int], dict[str, Product]], paths: dict[tuple[int, int], str], inputs: dict[int, Tensor]
) -> None:
    """All linears of a layer, each by its path."""
    for shape, path in paths.items():
        products[shape][path](inputs[shape[1]])


def measure(model: str, m: int, products: dict[tuple[int, int], dict[str, Product]], seconds: float) -> dict[str, list[Any]]:
    """The records and the layers of M rows."""
    inputs = {k: torch.randn(m, k, device="cuda").bfloat16() for _, k in products}
    records: list[dict[str, Any]] = []
    known: dict[str, dict[tuple[int, int], dict[str, float]]] = {"rested_us": {}, "loaded_us": {}}
    for (n, k), ways in products.items():
        rested = time_rows(ways, m, k, torch.bfloat16, inputs[k].device, patience=0.05)
        for path, call in ways.items():
            samples = back_to_back(partial(call, inputs[k]), seconds)
            record = {"model": model, "n": n, "k": k, "m": m, "path": path, "rested_us": round(rested[path].min * 1e6, 2)}
            records.append({**record, "loaded_us": settled(samples), "by_ms": by_window(samples)})
            print(records[-1], flush=True)
            for state, times in known.items():
                times.setdefault((n, k), {})[path] = records[-1][state]
    choices = [("one path", dict.fromkeys(products, path)) for path in next(iter(products.values()))]
    for state, times in known.items():
        choices.append((state, {shape: min((p for p in us if p != "twin"), key=us.__getitem__) for shape, us in times.items()}))
    layers = []
    for chosen, paths in choices:
        samples = back_to_back(partial(layer, products, paths, inputs), seconds)
        named = {f"{n}x{k}": path for (n, k), path in paths.items()}
        layers.append({"model": model, "m": m, "chosen": chosen, "paths": named, "us": settled(samples)})
        print(layers[-1], flush=True)
    return {"records": records, "layers": layers}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("out", type=Path)
    cli.add_argument("--model", choices=LINEARS, default="llama-3.1-8b")
    cli.add_argument("--rows", type=int, nargs="+", default=(2048, 8192))
    cli.add_argument("--peers", default="machete")
    cli.add_argument("--seconds", type=float, default=0.8)
    a = cli.parse_args()
    n, k = LINEARS[a.model][0]
    shape = Shape(a.model, n, k, *KINDS[0])
    peers, missing = available(random_weight(shape, 0), shape.dtype, a.peers.split(","))
    print("missing:", missing)
    found = json.loads(a.out.read_text()) if a.out.exists() else {"records": [], "layers": []}
    found["environment"] = environment()
    products = turns_of(a.model, peers)
    for m in a.rows:
        for name, rows in measure(a.model, m, products, a.seconds).items():
            found[name] += rows
    a.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
