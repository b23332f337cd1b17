"""`int4`: x @ W.T + b for few rows, where the time is that of reading the 4-bit weight once.

On NVIDIA GPUs from Ampere on the kernel is that of `ampere.py`, up to 16 rows, else that of `fused.py` with tiles for few rows.
Both use matrix instructions, for one row too: those are idle otherwise, and a product in fp32 would spend three instructions a
weight beyond unpacking it.
"""

from __future__ import annotations

from torch import Tensor

from .fused import Tiles, launch
from .tiles import decode_tiles


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x @ W.T + b for few rows (right for any number), accumulated in fp32 and rounded once.

    Shapes, exactness and errors are those of `fused_linear`. tiles: None for `decode_tiles`.
    """
    return launch(x, packed, scales, zeros, bias, group_size, out, tiles, decode_tiles)
