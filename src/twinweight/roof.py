"""Measure the roof of the machine at hand: the best GEMM rate a dtype reaches, and the bandwidth of a copy.

A roof that was measured is lower than the datasheet's, and the one that a kernel can be held to.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from twinweight import memory
from twinweight.gpus import MEASURED, Gpu
from twinweight.timing import interleaved

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_SIDES = (512, 1024, 2048, 4096, 8192)
_REPEATS = 5


def measure(device: torch.device | None = None) -> Gpu:
    """The roof of a device (default: the GPU if there is one, else the CPU) in a few seconds, as a `Gpu`.

    GEMMs are square, the largest that takes a CPU 0.1 s or a GPU 5 ms; a dtype that the device does not multiply is left out.
    The copy moves an eighth of the free memory, at most 1 GiB: more than any cache holds.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.get_device_module(device.type).get_device_name(device) if device.type != "cpu" else "CPU"
    found = memory.read_memory(device)
    enough = 0.1 if device.type == "cpu" else 5e-3
    rates = {dtype: rate for dtype in (*_DTYPES, "fp8", "tf32") if (rate := _gemm_rate(dtype, device, enough))}
    nbytes = min(found.free // 8, 1 << 30)
    how = f"measured with torch {torch.__version__}"
    if device.type == "cpu":
        how += f" on {torch.get_num_threads()} threads"
    return Gpu(
        name=f"{MEASURED} {name}",
        memory_bytes=found.total,
        bandwidth=_copy_rate(nbytes, device),
        matrix=rates,
        aliases=(),
        source={
            "memory": "read from the device",
            "bandwidth": f"{how}: copy of {nbytes >> 20} MiB, read and write counted",
            "matrix": f"{how}: best of {_REPEATS} square GEMMs",
        },
    )


def _gemm_rate(dtype: str, device: torch.device, enough: float) -> float | None:
    """FLOP/s of the largest square GEMM within `enough` seconds; None where the device refuses the dtype."""
    rate = None
    for side in _SIDES:
        try:
            with _fp32_on_tensor_cores(dtype == "tf32"):
                call = _gemm(dtype, side, device)
                time = interleaved({dtype: call}, device=device, repeats=_REPEATS)[dtype]
        except (RuntimeError, NotImplementedError):
            return rate
        rate = 2.0 * side**3 / time.min
        # The next side takes eight times as long.
        if time.min * 8 > enough:
            break
    return rate


def _gemm(dtype: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    if dtype == "int8":
        a, b = (torch.randint(-9, 9, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b)
    if dtype == "fp8":
        if device.type == "cpu":
            raise NotImplementedError("no fp8 roof on a CPU")
        fp8 = torch.float8_e4m3fnuz if "gfx94" in _arch(device) else torch.float8_e4m3fn
        one = torch.ones((), device=device)
        x, w = (torch.randn(side, side, device=device).to(fp8) for _ in range(2))
        return lambda: torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    if dtype == "tf32" and (device.type == "cpu" or torch.version.hip):
        raise NotImplementedError("tf32 is CUDA's")
    p, q = (torch.randn(side, side, device=device).to(_DTYPES.get(dtype, torch.float32)) for _ in range(2))
    return lambda: p @ q.T


def _arch(device: torch.device) -> str:
    return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")) if torch.version.hip else ""


@contextlib.contextmanager
def _fp32_on_tensor_cores(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _copy_rate(nbytes: int, device: torch.device) -> float:
    source = torch.ones(math.ceil(nbytes / 4), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    time = interleaved({"copy": lambda: target.copy_(source)}, device=device, repeats=_REPEATS)["copy"]
    return 2.0 * source.nbytes / time.min
