"""What 8-bit twins do to numbers, computed in fp32 on any device: for their quality where there is no GPU, and as an oracle.

Independent of the kernels: products here are those of the rounded sides, without a twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from twinweight.linear import Int4Linear
from twinweight.twin import GROUP, LOSSY
from twinweight.twins import int4_linears

_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def weight(kind: str, dense: Tensor) -> Tensor:
    """dense: fp32 [N, K] -> fp32 as a twin of a kind holds it. `fp8-exact` keeps the int4 grid, so it changes nothing."""
    return dense if kind == "fp8-exact" else _rounded(kind, dense)


def activations(kind: str, x: Tensor) -> Tensor:
    """x: [..., K] -> fp32 as the product sees it: one scale a token, for `fp8-exact` one for 128 columns of it."""
    x = x.float()
    if kind == "fp8-exact":
        return _rounded(kind, x.reshape(*x.shape[:-1], -1, GROUP)).flatten(-2)
    return _rounded(kind, x)


def _rounded(kind: str, values: Tensor) -> Tensor:
    """Rounded to 8 bits with one scale for the last axis, which maps the largest value to the largest of the 8-bit type."""
    largest = values.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    if LOSSY[kind] == torch.int8:
        return (values * (127 / largest)).round() * (largest / 127)
    scaled = (values * (_E4M3_MAX / largest)).clamp(-_E4M3_MAX, _E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).float() * (largest / _E4M3_MAX)


@contextmanager
def emulated(model: nn.Module, kind: str) -> Iterator[None]:
    """Every int4 weight of a model computes as a twin of this kind would, where `use_twin` is set."""
    linears = list(int4_linears(model).values())
    for linear in linears:
        held = weight(kind, linear.int4_weight.dequantize(torch.float32))
        linear.forward = partial(_forward, linear, linear.forward, kind, held)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _forward(linear: Int4Linear, otherwise: Callable[[Tensor], Tensor], kind: str, held: Tensor, x: Tensor) -> Tensor:
    if not linear.use_twin:
        return otherwise(x)
    bias = linear.bias.float() if linear.bias is not None else None
    return nn.functional.linear(activations(kind, x), held, bias).to(x.dtype)
