"""`stream`: does expanding the next layer's weight on a second stream, beside the current layer's GEMM, save time?

    python benchmarks/gpu_overlap.py OUT.json

A chain of layers of one shape, each expanded into one of two scratches and multiplied: all on one stream, and with the
expansion one layer ahead on another. Both are CUDA graphs, replayed in turn, on random data; microseconds a layer.
`twin`: the GEMMs alone.
Writes {"environment", "records": [{"n", "k", "m", "way": twin | serial | overlapped, "time_us"}]}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_paths import Shape, random_weight
from gpu_timing import interleaved

from twinweight.graphs import Graphs
from twinweight.kernels import dense_linear, gpu

SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (51200, 5120), (5120, 25600)]
ROWS = [512, 1024, 2048, 8192]
LAYERS = 8


def chains(n: int, k: int, m: int) -> dict[str, Callable[[], None]]:
    """The three ways through LAYERS layers."""
    shape = Shape("overlap", n, k, torch.bfloat16, True)
    weights = [gpu.prepare(random_weight(shape, seed)) for seed in range(LAYERS)]
    x = torch.randn(m, k, device="cuda").bfloat16()
    scratch = [gpu.empty_twin(n, k, torch.bfloat16, x.device) for _ in range(2)]
    side = torch.cuda.Stream()

    def twin() -> None:
        for i in range(LAYERS):
            dense_linear(x, scratch[i % 2], None)

    def serial() -> None:
        for weight in weights:
            gpu.expand(weight, scratch[0])
            dense_linear(x, scratch[0], None)

    def overlapped() -> None:
        main = torch.cuda.current_stream()
        used: list[torch.cuda.Event | None] = [None, None]
        gpu.expand(weights[0], scratch[0])
        for i in range(LAYERS):
            ready = None
            if i + 1 < LAYERS:
                # The scratch of the next layer is free once the GEMM before this one has read it.
                side.wait_event(used[(i + 1) % 2] or main.record_event())
                with torch.cuda.stream(side):
                    gpu.expand(weights[i + 1], scratch[(i + 1) % 2])
                    ready = side.record_event()
            dense_linear(x, scratch[i % 2], None)
            used[i % 2] = main.record_event()
            if ready is not None:
                main.wait_event(ready)

    return {"twin": twin, "serial": serial, "overlapped": overlapped}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    a = p.parse_args()
    graphs, records = Graphs(), []
    for n, k in SHAPES:
        for m in ROWS:
            captured = {way: (graphs.capture(run), LAYERS) for way, run in chains(n, k, m).items()}
            times = {way: round(statistics.median(s), 2) for way, s in interleaved(captured).items()}
            records += [{"n": n, "k": k, "m": m, "way": way, "time_us": us} for way, us in times.items()]
            print(n, k, m, times, f"overlapped/serial {times['overlapped'] / times['serial']:.3f}", flush=True)
    environment: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__,
        "date": time.strftime("%Y-%m-%d"), "command": "python benchmarks/gpu_overlap.py OUT.json",
    }  # fmt: skip
    a.out.write_text(json.dumps({"environment": environment, "records": records}, indent=0) + "\n")


if __name__ == "__main__":
    main()
