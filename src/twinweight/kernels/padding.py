"""Row strides off the cache cliff (design rule 6): one place for weights, twins and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

CACHE_LINE = 128
"""Bytes added to a row that would sit on the cliff."""

RDNA3_CLIFF = 2048
"""Row bytes that are a multiple of this fall on few cache channels of RDNA3 (seen by ROCm/vllm #1036 on gfx1151)."""


def padded_stride(columns: int, itemsize: int, *, cliff_bytes: int) -> int:
    """Row stride, in elements, of `columns` elements of `itemsize` bytes.

    One cache line (128 bytes) more than the row where its bytes are a multiple of `cliff_bytes`, else the row itself.
    cliff_bytes: 0 for none. Raises ValueError where a cache line does not hold whole elements.
    """
    if itemsize <= 0 or CACHE_LINE % itemsize:
        raise ValueError(f"itemsize: expected a divisor of {CACHE_LINE}, found {itemsize}")
    on_cliff = cliff_bytes > 0 and columns > 0 and columns * itemsize % cliff_bytes == 0
    return columns + CACHE_LINE // itemsize if on_cliff else columns


def cliff_bytes(device: torch.device) -> int:
    """`RDNA3_CLIFF` for a gfx11 GPU, 0 for everything else."""
    if device.type != "cuda" or torch.version.hip is None:
        return 0
    architecture = getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")
    return RDNA3_CLIFF if architecture.startswith("gfx11") else 0


def empty_padded(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [n, k], rows apart by `padded_stride` for the device: a view of the padded buffer."""
    stride = padded_stride(k, dtype.itemsize, cliff_bytes=cliff_bytes(device))
    return torch.empty((n, stride), dtype=dtype, device=device)[:, :k]
