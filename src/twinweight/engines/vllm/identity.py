"""The identity through a layer's inner kernel: its weight as that kernel sees it, bit for bit, whatever its layout."""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight.engines.vllm.wrapped import Wrapped

ROWS = 512
"""Identity rows a call: enough for a GPU, 24 MiB of them at K = 24576."""


def dense(kernel: Wrapped) -> Tensor:
    """The weight as the inner kernel sees it, [N, K] in the activation dtype: a temporary."""
    out = torch.empty(kernel.n, kernel.k, dtype=kernel.dtype, device=kernel.device)
    fill(kernel, out)
    return out


def fill(kernel: Wrapped, out: Tensor) -> None:
    for start in range(0, kernel.k, ROWS):
        which = range(start, min(start + ROWS, kernel.k))
        out[:, which.start : which.stop].copy_(columns(kernel, which).t())


def columns(kernel: Wrapped, which: range) -> Tensor:
    """Columns of the weight as the inner kernel sees it: [len(which), N], in the activation dtype."""
    device = kernel.device
    at = torch.arange(which.start, which.stop, which.step, device=device)
    eye = torch.zeros(len(which), kernel.k, dtype=kernel.dtype, device=device)
    eye.scatter_(1, at[:, None], 1)
    return kernel.inner_linear(eye, None)
