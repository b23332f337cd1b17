"""Host time of a linear's call in eager mode: what choosing a path and handing over to it adds to the call of the kernel.

    python benchmarks/gpu_dispatch.py OUT.json [--peer]

Microseconds of host time a call, medians over rounds that take the ways in turn; the GPU's queue never fills, and kernels are
short (256 x 256). Ways: `module` (Int4Linear), `op` (torch.ops.twinweight.linear, as a compiled graph calls it), `vllm` (the op
of a layer inside vLLM), `kernel` (the function of the path alone: output, launch), `linear` (F.linear on a dense weight of that
size) and, with --peer, `machete` (vLLM's op, as its compiled graph calls it). Writes {"environment", "records": [{"path", "m",
"way", "host_us", "swept_us"}]}: in a loop, and behind something that swept the caches, as the layers of a model do to each
other; `dispatch` is `module` less `kernel`. Runs on a CPU too, where ways compute.
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
from twinweight.engines.vllm import op as vllm_op
from twinweight.kernels import dense_linear, int4_path
from twinweight.linear import Int4Linear
from twinweight.steps import Steps
from twinweight.weight import Int4Weight

SIZE = 256
CALLS, ROUNDS = 200, 25
SWEEPS, SWEPT = 100, 64 << 20


def host_us(call: Callable[[], object]) -> float:
    """Microseconds of host time of one of CALLS calls, begun with an idle GPU."""
    synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def swept_us(call: Callable[[], object], memory: torch.Tensor) -> float:
    """Microseconds of host time of a call whose code and data have left the caches, begun with an idle GPU."""
    synchronize()
    memory.add_(1)
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Layer:
    """What vLLM's op asks of a layer, which takes one path."""

    def __init__(self, layer: Int4Linear, path: paths.Path) -> None:
        self.n, self.route, self.own = SIZE, paths.Route.always(path).flat(), layer.kernel_weight
        self.steps: Steps = {}
        self.twin, self.twin_scales, self.bias = layer.twin, None, None
        self.scales_t = None
        self.twin_t = layer.twin.t() if layer.twin is not None and not layer.twin.is_cpu else None


def ways(layer: Int4Linear, path: paths.Path, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The calls to compare for one path; the layer has a twin, and takes the path whatever the rows."""
    layer.use_twin = path == paths.Path.TWIN
    route = layer.route_with_twin = layer.route_without_twin = paths.Route.always(path)
    twin = layer.twin if layer.use_twin else None
    dense = torch.randn(SIZE, SIZE, device=x.device, dtype=x.dtype)
    weight, op = layer.kernel_weight, torch.ops.twinweight.linear.default
    inside, inside_op = Layer(layer, path), torch.ops.twinweight.vllm_linear.default
    handle = vllm_op.handle_for(inside, x.device)
    fields = weight.packed, weight.scales, weight.zeros, weight.perm, None, twin, None, route.flat(), weight.group_size, SIZE
    return {
        "module": lambda: layer(x),
        "op": lambda: op(x, *fields),
        "vllm": lambda: inside_op(x, handle, None, inside.n),
        "kernel": (lambda: int4_path(path, x, weight, None)) if twin is None else (lambda: dense_linear(x, twin, None)),
        "linear": lambda: torch.nn.functional.linear(x, dense),
    }


def machete(weight: Int4Weight, x: torch.Tensor) -> Callable[[], object]:
    """vLLM's op on its repacked weight."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind, op = scalar_types.uint4b8, torch.ops._C.machete_mm.default
    packed = ops.machete_prepack_B(weight.packed.t(), a_type=x.dtype, b_type=kind, group_scales_type=x.dtype)
    scales, number = weight.scales.t().contiguous(), kind.id
    return lambda: op(x, packed, number, None, scales, None, weight.group_size, None, None, None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--peer", action="store_true")
    a = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = torch.randint(-(2**31), 2**31 - 1, (SIZE, SIZE // 8), dtype=torch.int32, device=device)
    weight = Int4Weight(words, torch.rand(SIZE, SIZE // 128, device=device).bfloat16(), None, None, 128, SIZE)
    layer = Int4Linear(weight)
    layer.build_twin(torch.bfloat16)
    memory, records = torch.zeros(SWEPT, dtype=torch.uint8), []
    with torch.inference_mode():
        for path, m in ((paths.Path.INT4, 1), (paths.Path.FUSED, 64), (paths.Path.FUSED, 2048), (paths.Path.TWIN, 2048)):
            x = torch.randn(m, SIZE, device=device).bfloat16()
            found = ways(layer, path, x) | ({"machete": machete(weight, x)} if a.peer else {})
            samples: dict[str, list[float]] = {way: [] for way in found}
            swept: dict[str, list[float]] = {way: [] for way in found}
            for at in range(ROUNDS + 3):
                for way, call in found.items():
                    us = host_us(call)
                    if at >= 3:
                        samples[way].append(us)
            for _ in range(SWEEPS):
                for way, call in found.items():
                    swept[way].append(swept_us(call, memory))
            for way in found:
                us, cold = statistics.median(samples[way]), statistics.median(swept[way])
                records.append(
                    {"path": path.name.lower(), "m": m, "way": way, "host_us": round(us, 2), "swept_us": round(cold, 1)}
                )
                print(records[-1], flush=True)
            both = zip(samples["module"], samples["kernel"], strict=True)
            dispatch = round(statistics.median(a - b for a, b in both), 2)
            records.append({"path": path.name.lower(), "m": m, "way": "dispatch", "host_us": dispatch})
    environment = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": f"python {' '.join(sys.argv)}",
    }  # fmt: skip
    a.out.write_text(json.dumps({"environment": environment, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
