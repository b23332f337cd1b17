"""`KernelWeight`: an int4 weight in the layout that one device's kernels read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twinweight.weight import Int4Weight

TILE_BYTES = 32 << 20
"""Most bytes of temporaries while a weight is prepared or expanded: both work tile by tile."""


@dataclass(frozen=True)
class KernelWeight:
    """packed, scales and zeros are in the device's own layout (see `cpu.py`, `gpu.py`).

    perm: int32 [K] for act-order, else None: stored column j is column perm[j] of the checkpoint, so that
        the columns of a group lie together; activations are gathered with it, twins are stored in checkpoint order.
    group_size: as the kernels see it; n, k: the true shape, without padding.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    group_size: int
    n: int
    k: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.packed, self.scales, self.zeros, self.perm)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


Again = Callable[[Tensor, KernelWeight, Tensor | None], Tensor]
"""(x, an int4 weight, a bias or None) -> y, by a path and for sizes that are settled."""


def takes_group(k: int, group_size: int) -> bool:
    """Whether kernels take groups of so many columns: all K, or a multiple of 32 that divides it."""
    return group_size == k or (group_size > 0 and k % group_size == 0 and group_size % 32 == 0)


def group_order(weight: Int4Weight) -> Tensor | None:
    """The column order that makes groups contiguous, int32 [K], or None where they already are."""
    if weight.g_idx is None:
        return None
    return torch.argsort(weight.g_idx, stable=True).to(torch.int32)
