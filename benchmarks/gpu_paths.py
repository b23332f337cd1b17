"""Every path against the best known times for the same product, on one GPU; resumable in calls of a few minutes.

    python benchmarks/gpu_paths.py benchmarks/results/h200-paths.json [--quick] [--budget SECONDS] [--plot PLOT.png]

Shapes are the linears of three models, whole and cut for tensor parallel 2. Times are medians over interleaved replays of CUDA
graphs that rotate over copies of the weight (a round reads three times the L2), on random data, in microseconds a call, the
quantization of activations included. Adds what is missing to the file: {"environment", "records": [{"model", "n", "k", "m",
"dtype", "group_size", "symmetric", "path", "time_us"}]}. Paths of ours: int4, fused, twin, stream, expand (M = 0), fp8-exact,
fp8-row; peers: cublas, and those of `gpu_peers.py` that are installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS, available
from gpu_timing import copies_of, copy_bandwidth, matrix_rate, time_calls
from torch import Tensor

from twinweight.kernels import dense_linear, fp8, gpu, int4_path
from twinweight.paths import Path as Route
from twinweight.weight import Int4Weight

ROWS = (1, 2, 4, 5, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
GROUP = 128
FEW = {"tinygemm": 64, "int4": 512}  # rows beyond which a path is out of the question
MANY = {"stream": 128, "fp8-exact": 16, "fp8-row": 16}  # rows below which it is


@dataclass(frozen=True)
class Shape:
    model: str
    n: int
    k: int
    dtype: torch.dtype
    symmetric: bool


def shapes() -> list[Shape]:
    """What is measured, the most telling first."""
    linears = {
        "llama-3.1-8b": [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)],
        "qwen3-32b": [(51200, 5120), (5120, 25600), (10240, 5120), (5120, 8192)],
        "llama-3.3-70b": [(57344, 8192), (8192, 28672), (10240, 8192), (8192, 8192)],
    }
    row_parallel = {(4096, 14336), (4096, 4096), (5120, 25600), (5120, 8192), (8192, 28672), (8192, 8192)}
    found = []
    for dtype, symmetric in ((torch.bfloat16, True), (torch.float16, False), (torch.bfloat16, False), (torch.float16, True)):
        for tp in (1, 2):
            for model, whole in linears.items():
                for n, k in whole:
                    cut = (n, k) if tp == 1 else (n, k // 2) if (n, k) in row_parallel else (n // 2, k)
                    found.append(Shape(model if tp == 1 else f"{model} tp2", *cut, dtype, symmetric))
    return found


def random_weight(s: Shape, seed: int) -> Int4Weight:
    """Random words, scales of a realistic size, zero points around the middle."""
    g = torch.Generator("cuda").manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (s.n, s.k // 8), generator=g, device="cuda", dtype=torch.int32)
    scales = (torch.rand(s.n, s.k // GROUP, generator=g, device="cuda") * 0.01 + 0.001).to(s.dtype)
    zeros = None
    if not s.symmetric:
        zeros = torch.randint(4, 12, (s.n, s.k // GROUP), generator=g, device="cuda", dtype=torch.uint8)
    return Int4Weight(words, scales, zeros, None, GROUP, s.k)


def linears(s: Shape, peers: list[str]) -> dict[str, list[Callable[[Tensor], object]]]:
    """path -> the product on each copy of the weight. Copies differ only where that costs no time to make."""
    packed = [gpu.prepare(random_weight(s, seed)) for seed in range(copies_of(s.n * s.k // 2))]
    twins = [gpu.empty_twin(s.n, s.k, s.dtype, packed[0].packed.device) for _ in range(copies_of(s.n * s.k * 2))]
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
    eights = copies_of(s.n * s.k)
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
    if (*base.values(), 0) not in done:
        weights = [gpu.prepare(random_weight(s, seed)) for seed in range(copies_of(s.n * s.k // 2))]
        out = torch.empty(s.n, s.k, dtype=s.dtype, device="cuda")
        us = time_calls({"expand": [lambda w=w: gpu.expand(w, out) for w in weights]}, 4)["expand"]
        records.append({**base, "m": 0, "path": "expand", "time_us": round(us, 3)})
    for m in todo:
        if over():
            break
        x = torch.randn(m, s.k, device="cuda").to(s.dtype)
        variants = {name: [lambda f=f, x=x: f(x) for f in calls] for name, calls in products.items() if wanted(name, m)}
        times = time_calls(variants, max(1, min(16, 2048 // m)), rounds=5 if m <= 2048 else 3)
        records += [{**base, "m": m, "path": path, "time_us": round(us, 3)} for path, us in times.items()]
        best = min(times, key=times.__getitem__)
        print(
            f"{s.model} {s.n}x{s.k} {base['dtype']} M={m}: best {best}; " + " ".join(f"{k} {v:.1f}" for k, v in times.items()),
            flush=True,
        )
    return records


def take_tiles(records: list[dict[str, Any]]) -> None:
    """Make the fastest measured tiles those that are chosen, at measured shapes and numbers of rows."""
    from twinweight.kernels import decode, fused
    from twinweight.kernels.tiles import DotTiles, decode_tiles, fused_tiles

    best: dict[tuple[int, int, int], tuple[float, DotTiles]] = {}
    for r in records:
        at = (r["m"], r["n"], r["k"])
        if r["m"] and r["time_us"] < best.get(at, (1e30,))[0]:
            best[at] = (r["time_us"], DotTiles(**r["tiles"]))

    def taken(choose: Callable[..., DotTiles]) -> Callable[..., DotTiles]:
        return lambda m, n, k, *rest: best[m, n, k][1] if (m, n, k) in best else choose(m, n, k, *rest)

    decode.decode_tiles, fused.fused_tiles = taken(decode_tiles), taken(fused_tiles)


def plot(result: dict[str, Any], out: Path) -> None:
    """TFLOP/s over M of each path, one panel a shape of the first model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [
        r for r in result["records"] if r["m"] and r["model"] == "llama-3.1-8b" and r["dtype"] == "bfloat16" and r["symmetric"]
    ]
    panels = sorted({(r["n"], r["k"]) for r in records}, reverse=True)
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(5 * max(1, len(panels)), 4.5), squeeze=False)
    for (n, k), ax in zip(panels, axes[0], strict=False):
        for path in sorted({r["path"] for r in records}):
            points = sorted(
                (r["m"], 2 * r["m"] * n * k / r["time_us"] / 1e6)
                for r in records
                if (r["n"], r["k"], r["path"]) == (n, k, path)
            )
            ax.plot(*zip(*points, strict=True), marker=".", label=path) if points else None
        ax.set(xscale="log", yscale="log", title=f"{n} x {k}", xlabel="rows M", ylabel="TFLOP/s")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--quick", action="store_true", help="the whole linears of the smallest model in bf16, fewer M")
    p.add_argument("--budget", type=float, default=540.0, help="seconds after which no further size is begun")
    p.add_argument("--plot", type=Path)
    p.add_argument("--tiles", type=Path, help="what gpu_tiles.py wrote: its fastest tiles in place of the chosen ones")
    a = p.parse_args()
    begun = time.monotonic()
    if a.tiles:
        take_tiles(json.loads(a.tiles.read_text())["records"])
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"environment": {}, "records": []}
    done = {tuple(r[f] for f in ("model", "n", "k", "dtype", "group_size", "symmetric", "m")) for r in result["records"]}
    first = Shape("probe", 4096, 4096, torch.bfloat16, True)
    peers, reasons = available(random_weight(first, 0), first.dtype, list(PEERS))
    for name, reason in reasons.items():
        print(f"without {name}: {reason}")
    result["environment"] |= {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__,
        "date": time.strftime("%Y-%m-%d"), "copy_bytes_s": round(copy_bandwidth()), "bf16_flop_s": round(matrix_rate()),
        "peers": peers, "missing": reasons, "command": "python benchmarks/gpu_paths.py benchmarks/results/h200-paths.json",
    }  # fmt: skip
    print(f"{len(peers)} peers after {time.monotonic() - begun:.0f} s: {result['environment']}", flush=True)
    for s in shapes()[:4] if a.quick else shapes():
        if time.monotonic() - begun > a.budget:
            break
        usable = [n for n in peers if n != "tinygemm" or s.dtype == torch.bfloat16]
        found = measure(s, QUICK_ROWS if a.quick else ROWS, usable, done, lambda: time.monotonic() - begun > a.budget)
        result["records"] += found
        a.out.write_text(json.dumps(result, indent=0) + "\n")
        torch.cuda.empty_cache()
    if a.plot:
        plot(result, a.plot)


if __name__ == "__main__":
    main()
