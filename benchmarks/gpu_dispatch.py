"""Host time of a linear's call in eager mode: what choosing a path and handing over to it adds to the call of the kernel.

    python benchmarks/gpu_dispatch.py OUT.json

Microseconds of host time a call, medians over rounds that take the ways in turn; the GPU's queue never fills, and kernels are
short (256 x 256). Ways: `module` (Int4Linear), `op` (torch.ops.twinweight.linear, as a compiled graph calls it), `kernel` (the
function of the path alone: output, launch) and `linear` (F.linear on a dense weight of that size). Writes {"environment",
"records": [{"path", "m", "way", "host_us"}]}; `dispatch` is `module` less `kernel`. Runs on a CPU too, where ways compute.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from twinweight import paths
from twinweight.kernels import dense_linear, int4_path
from twinweight.linear import Int4Linear
from twinweight.weight import Int4Weight

SIZE = 256
CALLS, ROUNDS = 200, 25


def host_us(call: Callable[[], object]) -> float:
    """Microseconds of host time of one of CALLS calls, begun with an idle GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def ways(layer: Int4Linear, path: paths.Path, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The calls to compare for one path; the layer has a twin, and takes the path whatever the rows."""
    layer.use_twin = path == paths.Path.TWIN
    route = layer.route_with_twin = layer.route_without_twin = paths.Route.always(path)
    twin = layer.twin if layer.use_twin else None
    dense = torch.randn(SIZE, SIZE, device=x.device, dtype=x.dtype)
    weight, op = layer.kernel_weight, torch.ops.twinweight.linear.default
    fields = weight.packed, weight.scales, weight.zeros, weight.perm, None, twin, None, route.flat(), weight.group_size, SIZE
    return {
        "module": lambda: layer(x),
        "op": lambda: op(x, *fields),
        "kernel": (lambda: int4_path(path, x, weight, None)) if twin is None else (lambda: dense_linear(x, twin, None)),
        "linear": lambda: torch.nn.functional.linear(x, dense),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    out = p.parse_args().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = torch.randint(-(2**31), 2**31 - 1, (SIZE, SIZE // 8), dtype=torch.int32, device=device)
    scales = torch.rand(SIZE, SIZE // 128, device=device).bfloat16()
    layer = Int4Linear(Int4Weight(words, scales, None, None, 128, SIZE))
    layer.build_twin(torch.bfloat16)
    records = []
    with torch.inference_mode():
        for path, m in ((paths.Path.INT4, 1), (paths.Path.FUSED, 64), (paths.Path.TWIN, 256)):
            found = ways(layer, path, torch.randn(m, SIZE, device=device).bfloat16())
            samples: dict[str, list[float]] = {way: [] for way in found}
            for at in range(ROUNDS + 3):
                for way, call in found.items():
                    us = host_us(call)
                    if at >= 3:
                        samples[way].append(us)
            times = {way: round(statistics.median(s), 2) for way, s in samples.items()}
            both = zip(samples["module"], samples["kernel"], strict=True)
            times["dispatch"] = round(statistics.median(a - b for a, b in both), 2)
            records += [{"path": path.name.lower(), "m": m, "way": way, "host_us": us} for way, us in times.items()]
            print(path.name.lower(), m, times, flush=True)
    environment = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": f"python {' '.join(sys.argv)}",
    }  # fmt: skip
    out.write_text(json.dumps({"environment": environment, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
