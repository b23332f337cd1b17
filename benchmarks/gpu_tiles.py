"""Tiles of the int4 product, measured: what `kernels/tiles.py` chooses from.

    python benchmarks/gpu_tiles.py OUT.json [--workers 12] [--budget SECONDS] [--models llama-3.1-8b] [--rows 16 64 512]

Compiles the candidates in parallel, checks each against float64, times them interleaved by graph replay, and writes
{"environment", "records": [{"n", "k", "m", "symmetric", "tiles", "time_us"}]}, the 40 fastest of each shape and
M. Prints three of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_paths
import torch
from gpu_paths import LINEARS, Shape
from gpu_timing import capture, copies_of, environment, interleaved

from twinweight.kernels import device, gpu, rounds
from twinweight.kernels.expand import expand
from twinweight.kernels.forms import DotTiles, ExpandTiles
from twinweight.kernels.fused import Tiles, fused_linear
from twinweight.kernels.prepared import KernelWeight
from twinweight.weight import Int4Weight

ROWS = [1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512]


def candidates(m: int, n: int, k: int, zeros: bool) -> list[Tiles]:
    """What may be good for m rows: the best of each size by the models in `rounds.py`, and from 17 to 32 some of `fused.py`."""
    traits = device.traits_of(torch.device("cuda", 0))
    modelled: list[tuple[float, Any, int, int]]
    if m <= 16:
        modelled = list(rounds.ampere_candidates(m, n, k, 128, traits, zeros))
        modelled += rounds.hopper_few_candidates(n, k, traits, zeros) if m > 8 and traits.wgmma else []
    else:
        modelled = list(rounds.hopper_candidates(m, n, k, traits, zeros))
    modelled.sort(key=lambda candidate: candidate[0])
    by_size: dict[Tiles, list[Tiles]] = {}
    for us, size, split, whole in modelled:
        if us < (1.4 if m <= 32 else 1.25) * modelled[0][0]:
            by_size.setdefault(size, []).append(replace(size, split_k=split, whole=whole))
    chosen = [t for found in by_size.values() for t in found[: 8 if m <= 32 else 4]]
    if not 16 < m <= 32:
        return chosen
    plain = [DotTiles(32, n, 16, split, 8, 4, stages, True) for n in (64, 128) for stages in (3, 4) for split in range(1, 9)]
    return chosen + [t for t in plain if 66 <= -(-n // t.block_n) * t.split_k <= (1200 if t.split_k > 1 else 1 << 30)]


def expand_candidates() -> list[ExpandTiles]:
    """Tiles of `expand`."""
    grid = [(8, 2), (16, 2), (16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8)]
    return [ExpandTiles(n, 16, warps) for n, warps in grid]


def random_weight(n: int, k: int, seed: int = 0, zeros: bool = False) -> Int4Weight:
    """A random bf16 weight on the GPU, with or without zero points."""
    return gpu_paths.random_weight(Shape("", n, k, torch.bfloat16, not zeros), seed)


def _compiled_as(t: Tiles) -> Tiles:
    """Tiles whose kernel is the same, for a small weight."""
    return t if isinstance(t, DotTiles) else replace(t, whole=0, split_k=min(2, t.split_k))


def compile_one(job: tuple[int, Tiles | ExpandTiles, bool]) -> str | None:
    """In a worker: compiles into Triton's cache by one launch on a small weight; the error where there is one."""
    m, t, zeros = job
    try:
        w = gpu.prepare(random_weight(256, 4096, zeros=zeros))
        if isinstance(t, ExpandTiles):
            out = torch.empty(256, 4096, device="cuda", dtype=torch.bfloat16)
            expand(w.packed, w.scales, None, None, out, group_size=128, tiles=t)
            return None
        x = torch.randn(m, 4096, device="cuda").bfloat16()
        fused_linear(x, w.packed, w.scales, w.zeros, None, group_size=128, tiles=t)
        torch.cuda.synchronize()
    except Exception as error:  # reported, and the candidate dropped
        return f"{type(error).__name__}: {error}"[:200]
    return None


def expansions(n: int, k: int, weights: list[KernelWeight]) -> list[dict[str, object]]:
    """Records (M = 0) of `expand` with each of its tiles, each checked bit for bit."""
    outs = [torch.empty(n, k, device="cuda", dtype=torch.bfloat16) for _ in weights]
    truth = random_weight(n, k).dequantize()
    graphs = {}
    for t in expand_candidates():
        calls = [
            lambda w=w, out=out, t=t: expand(w.packed, w.scales, None, None, out, group_size=128, tiles=t)
            for w, out in zip(weights, outs, strict=True)
        ]
        if not torch.equal(calls[0](), truth):
            print("WRONG", n, k, t)
        graphs[t] = capture(calls)
    best = sorted(((min(s), t) for t, s in interleaved(graphs, rounds=5).items()), key=lambda pair: pair[0])
    moved = n * k * (2.5 + 2 / 128)
    for us, t in best[:5]:
        print(f"{n}x{k} expand: {us:8.2f} us {moved / us / 1e6:.2f} TB/s {tuple(asdict(t).values())}", flush=True)
    return [{"n": n, "k": k, "m": 0, "symmetric": True, "tiles": asdict(t), "time_us": round(us, 3)} for us, t in best]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--workers", type=int, default=12)
    p.add_argument("--compile-only", action="store_true", help="fill Triton's cache and stop")
    p.add_argument("--budget", type=float, default=240.0, help="seconds after which no further size is begun")
    p.add_argument("--rows", type=int, nargs="+", default=ROWS)
    p.add_argument("--zeros", action="store_true", help="weights with zero points; without `expand`")
    p.add_argument("--models", nargs="+", default=["llama-3.1-8b"], choices=LINEARS)
    a = p.parse_args()
    begun = time.monotonic()
    shapes = [shape for model in a.models for shape in LINEARS[model]]
    wanted = ((m, t) for m in a.rows for n, k in shapes for t in candidates(m, n, k, a.zeros))
    jobs = list(dict.fromkeys((1 if m == 1 else 8 if m % 16 else 16, _compiled_as(t), a.zeros) for m, t in wanted))
    expanding = [] if a.zeros else [(16, t, False) for t in expand_candidates()]
    if a.workers:
        with multiprocessing.get_context("spawn").Pool(a.workers) as pool:
            failed = [e for e in pool.map(compile_one, jobs + expanding, chunksize=1) if e]
        for message in sorted(set(failed)):
            print("fails:", message, failed.count(message))
        print(f"{len(jobs)} candidates compiled in {time.monotonic() - begun:.0f} s", flush=True)
    if a.compile_only:
        return
    records = []
    for n, k in shapes:
        weights = [gpu.prepare(random_weight(n, k, seed, a.zeros)) for seed in range(copies_of(n * k // 2))]
        dense = random_weight(n, k, 0, a.zeros).dequantize().float()
        records += [] if a.zeros else expansions(n, k, weights)
        for m in a.rows:
            if time.monotonic() - begun > a.budget:
                break
            x = torch.randn(m, k, device="cuda").bfloat16()
            truth = x.float() @ dense.t()
            graphs = {}
            for t in candidates(m, n, k, a.zeros):
                calls = [
                    lambda w=w, t=t, x=x: fused_linear(x, w.packed, w.scales, w.zeros, None, group_size=128, tiles=t)
                    for w in weights
                ]
                try:
                    error = float((calls[0]().float() - truth).norm() / truth.norm())
                except Exception as problem:  # more shared memory than there is, say
                    print("fails:", t, repr(problem)[:100])
                    continue
                if not error < 1e-2:
                    print("WRONG", n, k, m, t, error)
                    continue
                graphs[t] = capture(calls, max(1, min(len(calls), 2048 // m)))
            samples = interleaved(graphs, rounds=3, warm=1)
            best = sorted(((min(s), t) for t, s in samples.items()), key=lambda pair: pair[0])
            kind = {"n": n, "k": k, "m": m, "symmetric": not a.zeros}
            records += [{**kind, "tiles": asdict(t), "time_us": round(us, 3)} for us, t in best[:40]]
            for us, t in best[:3]:
                rate = (
                    f"{2 * m * n * k / us / 1e6:.0f} TFLOP/s" if m >= 32 else f"{n * k * (0.5 + 2 / 128) / us / 1e6:.2f} TB/s"
                )
                print(f"{n}x{k} M={m}: {us:8.2f} us {rate} {tuple(asdict(t).values())}", flush=True)
            a.out.write_text(json.dumps({"environment": environment(), "records": records}))
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
