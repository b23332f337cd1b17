"""Which layers may have a twin is found by what they compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

import torch
from torch import Tensor, nn

from twinweight.engines.vllm.weight_only import is_linear


def exact(x: Tensor) -> Tensor:
    return x


def by_token(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def by_tensor(x: Tensor) -> Tensor:
    step = x.abs().amax() / 127
    return (x / step).round() * step


def by_group(x: Tensor) -> Tensor:
    return by_token(x.unflatten(-1, (-1, 128))).flatten(-2)


def in_fp8(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 448
    return (x / step).to(torch.float8_e4m3fn).to(x.dtype) * step


def fixed_integers(x: Tensor) -> Tensor:
    return (x * 16).round().clamp(-128, 127) / 16


def fixed_fp8(x: Tensor) -> Tensor:
    return (x * 16).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) / 16


def beyond_a_few_rows(x: Tensor) -> Tensor:
    return by_token(x) if len(x) > 16 else x


def broken(x: Tensor) -> Tensor:
    return x * torch.nan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [256, 1152, 14336])
@pytest.mark.parametrize(
    "quantize",
    [exact, by_token, by_tensor, by_group, in_fp8, fixed_integers, fixed_fp8, beyond_a_few_rows, broken],
    ids=lambda f: f.__name__,
)
def test_activation_quantization_is_seen(quantize: Callable[[Tensor], Tensor], k: int, dtype: torch.dtype) -> None:
    layer: Any = nn.Linear(k, 96, bias=False, dtype=dtype)

    def apply(layer: nn.Linear, x: Tensor, bias: None) -> Tensor:
        return nn.functional.linear(quantize(x.float()).to(dtype), layer.weight)

    layer.quant_method = SimpleNamespace(apply=apply)
    kernel: Any = SimpleNamespace(layer=layer, k=k, dtype=dtype)
    assert is_linear(kernel) is (quantize is exact)
