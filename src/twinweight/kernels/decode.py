"""`int4`: x @ W.T + b for few rows, where the time is that of reading the 4-bit weight once.

The kernel is that of `fused.py` with tiles for few rows, one row too: matrix instructions are idle otherwise, and a product in
fp32 would spend three instructions a weight beyond unpacking it.
"""

from __future__ import annotations

from torch import Tensor

from .fused import launch
from .tiles import DotTiles, decode_tiles


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    out: Tensor | None = None,
    tiles: DotTiles | None = None,
) -> Tensor:
    """x @ W.T + b for few rows (right for any number), accumulated in fp32 and rounded once.

    Shapes, exactness and errors are those of `fused_linear`. tiles: None for `decode_tiles`.
    """
    return launch(x, packed, scales, zeros, bias, group_size, out, tiles, decode_tiles)
