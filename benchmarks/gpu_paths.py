"""Every path against the best known times for the same product, on one GPU; resumable in calls of a few minutes.

    python benchmarks/gpu_paths.py OUT.json [--shapes 0:4] [--rows 1 16 512] [--peers marlin,machete] [--workers 12]

WORKERS processes compile side by side first. Shapes are the linears of three models, whole and cut for tensor parallel 2. Times
are medians over interleaved replays of CUDA graphs that rotate over copies of the weight (a round reads three times the L2), on
random data, in microseconds a call, the quantization of activations included. Each product is compared with one in fp32 first;
what is wrong is named, left out, and makes the exit status 1. Adds what is missing to the file: {"environment", "records":
[{"model", "n", "k", "m", "dtype", "group_size", "symmetric", "path", "time_us"}]}. Paths of ours: int4, fused, twin, stream,
expand (M = 0), fp8-exact, fp8-row, and chosen, which is what the measured route takes where there is an exact twin; peers:
cublas, those of `gpu_peers.py` that are installed, and copy (M = 0), which moves as many bytes as expand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_peers import BF16_ONLY, PEERS, available
from gpu_timing import copies_of, copy_bandwidth, matrix_rate, time_calls
from torch import Tensor

from twinweight.crossover import twin_choice
from twinweight.graphs import Graphs
from twinweight.kernels import dense_linear, fp8, gpu, int4_path
from twinweight.paths import Path as Route
from twinweight.search import time_variants
from twinweight.timing import in_turn
from twinweight.weight import Int4Weight

ROWS = (1, 2, 4, 5, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
GROUP = 128
FEW = {"tinygemm": 64, "int4": 512}  # rows beyond which a path is out of the question
MANY = {"stream": 128, "fp8-exact": 16, "fp8-row": 16}  # rows below which it is
EXACT, EIGHT_BITS = 1e-2, 6e-2  # the most that a product may differ from one in fp32: ||y - ref|| / ||ref||
COMPARED = 64  # rows at either end that are compared


@dataclass(frozen=True)
class Shape:
    model: str
    n: int
    k: int
    dtype: torch.dtype
    symmetric: bool


LINEARS = {
    "llama-3.1-8b": [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)],
    "qwen3-32b": [(51200, 5120), (5120, 25600), (10240, 5120), (5120, 8192)],
    "llama-3.3-70b": [(57344, 8192), (8192, 28672), (10240, 8192), (8192, 8192)],
}
ROW_PARALLEL = {(4096, 14336), (4096, 4096), (5120, 25600), (5120, 8192), (8192, 28672), (8192, 8192)}
KINDS = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False), (torch.float16, True))


def shapes() -> list[Shape]:
    """What can be measured: the models whole, other dtypes and zero points of the smallest, the rest."""

    def of(model: str, dtype: torch.dtype, symmetric: bool, tp: int) -> list[Shape]:
        cuts = [(n, k) if tp == 1 else (n, k // tp) if (n, k) in ROW_PARALLEL else (n // tp, k) for n, k in LINEARS[model]]
        return [Shape(model if tp == 1 else f"{model} tp{tp}", n, k, dtype, symmetric) for n, k in cuts]

    small, *large = LINEARS
    found = [s for model in LINEARS for s in of(model, *KINDS[0], 1)]
    found += [s for kind in KINDS[1:] for s in of(small, *kind, 1)]
    found += [s for model in LINEARS for s in of(model, *KINDS[0], 2)]
    found += [s for kind in KINDS[1:] for model in large for s in of(model, *kind, 1)]
    return found + [s for kind in KINDS[1:] for model in LINEARS for s in of(model, *kind, 2)]


def random_weight(s: Shape, seed: int) -> Int4Weight:
    """Random words, scales of a realistic size, zero points around the middle."""
    g = torch.Generator("cuda").manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (s.n, s.k // 8), generator=g, device="cuda", dtype=torch.int32)
    scales = (torch.rand(s.n, s.k // GROUP, generator=g, device="cuda") * 0.01 + 0.001).to(s.dtype)
    zeros = None
    if not s.symmetric:
        zeros = torch.randint(4, 12, (s.n, s.k // GROUP), generator=g, device="cuda", dtype=torch.uint8)
    return Int4Weight(words, scales, zeros, None, GROUP, s.k)


def linears(s: Shape, peers: list[str], most: int = 32) -> dict[str, list[Callable[[Tensor], object]]]:
    """path -> the product on each copy of the weight, `most` at most. Copies differ only where that costs no time to make."""

    def copies(nbytes: int) -> int:
        return min(most, copies_of(nbytes))

    packed = [gpu.prepare(random_weight(s, seed)) for seed in range(copies(s.n * s.k // 2))]
    twins = [gpu.empty_twin(s.n, s.k, s.dtype, packed[0].packed.device) for _ in range(copies(s.n * s.k * 2))]
    for twin, w in zip(twins, packed, strict=False):
        gpu.expand(w, twin)
    plain = [t.clone(memory_format=torch.contiguous_format) for t in twins]
    found: dict[str, list[Callable[[Tensor], object]]] = {
        "int4": [lambda x, w=w: gpu.int4_linear(x, w, None) for w in packed],
        "fused": [lambda x, w=w: gpu.fused_linear(x, w, None) for w in packed],
        "twin": [lambda x, t=t: dense_linear(x, t, None) for t in twins],
        "stream": [lambda x, w=w: int4_path(Route.STREAM, x, w, None) for w in packed],
        "cublas": [lambda x, t=t: torch.nn.functional.linear(x, t) for t in plain],
    }
    eights = copies(s.n * s.k)
    if fp8.supported(packed[0].packed.device):
        rows = [fp8.row_twin(w) for w in packed[:eights]]
        exact = [fp8.exact_twin(w.packed, w.scales, w.zeros, GROUP) for w in packed[:eights]]
        found["fp8-row"] = [lambda x, t=t: fp8.row_linear(x, *t, None) for t in rows]
        found["fp8-exact"] = [lambda x, t=t: fp8.exact_linear(x, *t, None) for t in exact]
    for name in peers:
        found[name] = [PEERS[name](random_weight(s, seed), s.dtype) for seed in range(len(packed))]
    return found


def wanted(path: str, m: int) -> bool:
    return MANY.get(path, 0) <= m <= FEW.get(path, 1 << 30)


def compile_one(s: Shape, rows: tuple[int, ...], peers: list[str]) -> None:
    """In a worker: one call of every product, which fills the compilers' caches. Errors show when the product is timed."""
    for path, (product, *_) in linears(s, peers, most=1).items():
        for m in rows:
            if wanted(path, m):
                with contextlib.suppress(Exception):
                    product(torch.randn(m, s.k, device="cuda").to(s.dtype))
    torch.cuda.synchronize()


def chosen_by_route(s: Shape, products: dict[str, list[Callable[[Tensor], object]]]) -> Callable[[int], str]:
    """M -> the path of ours that a server with an exact twin takes: the route of a start-up's measurement, here and now."""
    named = {"int4": "int4", "fused": "fused", twin_choice(s.dtype): "twin"}
    ways = {choice: in_turn(products[path]) for choice, path in named.items()}
    graphs = Graphs()
    measured = time_variants(ways, s.k, s.n, s.dtype, torch.device("cuda"), wraps=lambda m: graphs.replayed)
    pieces = measured.pieces(tuple(named))
    return lambda m: named[next(choice for start, choice in reversed(pieces) if start <= m)]


def errors(variants: dict[str, list[Callable[[], Any]]], x: Tensor, dense: Tensor) -> dict[str, float]:
    """How far each product is from one in fp32, by its first and last rows."""
    ends = [*range(min(COMPARED, len(x))), *range(max(COMPARED, len(x) - COMPARED), len(x))]
    truth = x[ends].float() @ dense.float().t()
    return {path: float((calls[0]()[ends].float() - truth).norm() / truth.norm()) for path, calls in variants.items()}


WRONG: list[str] = []
"""Paths that computed something else."""


def measure(
    s: Shape, rows: tuple[int, ...], peers: list[str], done: set[tuple[Any, ...]], over: Callable[[], bool]
) -> list[Any]:
    """Records of one shape, those in `done` left out; ends early when `over`."""
    base = {"model": s.model, "n": s.n, "k": s.k, "dtype": str(s.dtype)[6:], "group_size": GROUP, "symmetric": s.symmetric}
    todo = [m for m in rows if (*base.values(), m) not in done]
    records: list[Any] = []
    if not todo:
        return records
    products = linears(s, peers)
    choose = chosen_by_route(s, products)
    dense = random_weight(s, 0).dequantize()
    if (*base.values(), 0) not in done:
        weights = [gpu.prepare(random_weight(s, seed)) for seed in range(copies_of(s.n * s.k // 2))]
        out = torch.empty(s.n, s.k, dtype=s.dtype, device="cuda")
        moved = weights[0].nbytes + out.nbytes
        sources = [torch.randint(0, 255, (moved // 8,), dtype=torch.int32, device="cuda") for _ in range(copies_of(moved // 2))]
        target = torch.empty_like(sources[0])
        calls = {
            "expand": [lambda w=w: gpu.expand(w, out) for w in weights],
            "copy": [lambda x=x: torch.bitwise_not(x, out=target) for x in sources],
        }
        records += [{**base, "m": 0, "path": path, "time_us": round(us, 3)} for path, us in time_calls(calls, 4).items()]
    for m in todo:
        if over():
            break
        x = torch.randn(m, s.k, device="cuda").to(s.dtype)
        variants = {name: [lambda f=f, x=x: f(x) for f in calls] for name, calls in products.items() if wanted(name, m)}
        for path, error in errors(variants, x, dense).items():
            if not error < (EIGHT_BITS if path.startswith("fp8") else EXACT):
                print(f"WRONG: {path}, {s}, M={m}: {error:.3g}", flush=True)
                WRONG.append(path)
                del variants[path]
        if choose(m) in variants:
            variants["chosen"] = variants[choose(m)]
        times = time_calls(variants, max(1, min(16, 2048 // m)), rounds=9 if m <= 2048 else 5)
        records += [{**base, "m": m, "path": path, "time_us": round(us, 3)} for path, us in times.items()]
        best = min(times, key=times.__getitem__)
        print(
            f"{s.model} {s.n}x{s.k} {base['dtype']} M={m}: best {best}; " + " ".join(f"{k} {v:.1f}" for k, v in times.items()),
            flush=True,
        )
    return records


def plot(result: dict[str, Any], out: Path) -> None:
    """Time against rows by path, a panel a shape of symmetric bf16 weights."""
    from readme_plots import path_panel

    from twinweight.plots import canvas

    records = [r for r in result["records"] if r["dtype"] == "bfloat16" and r["symmetric"]]
    kinds = dict.fromkeys((r["model"], r["n"], r["k"]) for r in records)
    gpu = result["environment"]["gpu"]
    panels = [path_panel([r for r in records if r["model"] == model], n, k, model, gpu) for model, n, k in kinds]
    canvas.save(panels, out, None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--shapes", default="0:12", help="a slice of `shapes()`: 0:4 llama-3.1-8b, 0:12 all three models")
    p.add_argument("--rows", type=int, nargs="+", default=ROWS)
    p.add_argument("--peers", default=",".join(PEERS), help="names of `gpu_peers.py`, with commas")
    p.add_argument("--budget", type=float, default=540.0, help="seconds after which no further size is begun")
    p.add_argument("--workers", type=int, default=12, help="processes that compile first; 0: none")
    p.add_argument("--plot", type=Path, help="write a plot here: time against rows by path, a panel a shape of bf16 weights")
    a = p.parse_args()
    begun = time.monotonic()
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"environment": {}, "records": []}
    done = {tuple(r[f] for f in ("model", "n", "k", "dtype", "group_size", "symmetric", "m")) for r in result["records"]}
    first = Shape("probe", 4096, 4096, torch.bfloat16, True)
    peers, reasons = available(random_weight(first, 0), first.dtype, [name for name in a.peers.split(",") if name])
    for name, reason in reasons.items():
        print(f"without {name}: {reason}")
    result["environment"] |= {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__,
        "date": time.strftime("%Y-%m-%d"), "copy_bytes_s": round(copy_bandwidth()), "bf16_flop_s": round(matrix_rate()),
    }  # fmt: skip
    result["environment"].setdefault("commands", []).append(shlex.join(["python", *sys.argv]))
    print(f"{len(peers)} peers after {time.monotonic() - begun:.0f} s: {result['environment']}", flush=True)
    some, rows = shapes()[slice(*map(int, a.shapes.split(":")))], tuple(a.rows)
    usable = {s: [n for n in peers if n not in BF16_ONLY or s.dtype == torch.bfloat16] for s in some}
    if a.workers:
        with multiprocessing.get_context("spawn").Pool(a.workers) as pool:
            pool.starmap(compile_one, [(s, rows, usable[s]) for s in some], chunksize=1)
        print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
    for s in some:
        if time.monotonic() - begun > a.budget:
            break
        found = measure(s, rows, usable[s], done, lambda: time.monotonic() - begun > a.budget)
        result["records"] += found
        a.out.write_text(json.dumps(result, indent=0) + "\n")
        torch.cuda.empty_cache()
    if a.plot:
        plot(result, a.plot)
    sys.exit(bool(WRONG))


if __name__ == "__main__":
    main()
