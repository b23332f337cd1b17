"""What every path is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight.weight import Int4Weight


def linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] @ W.T + b in float64 [M, N], on the canonical weight: the one rounded once to x's dtype."""
    dense = weight.dequantize(x.dtype).double()
    return torch.nn.functional.linear(x.double(), dense, bias.double() if bias is not None else None)
