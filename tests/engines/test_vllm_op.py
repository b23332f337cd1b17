"""The op inside a vLLM layer: which kernel serves which path, and with which bias. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import random_weight
from twinweight.engines.vllm import build, op, own
from twinweight.kernels import backend_for
from twinweight.paths import Path, Route

N, K = 128, 128
CPU = torch.device("cpu")


class Permuting:
    """A layer whose inner kernel keeps the bias in an order of its own, as Marlin does, and says when it was called."""

    def __init__(self, *, own: bool, twin: bool) -> None:
        weight = random_weight(N, K, 64)
        order = torch.randperm(N)
        self.n, self.k, self.dtype, self.device = N, K, torch.bfloat16, CPU
        self.dense = weight.dequantize(torch.bfloat16)
        self.true_bias = torch.randn(N).to(torch.bfloat16)
        self.layer = SimpleNamespace(bias=self.true_bias[order])
        self.inverse = torch.argsort(order)
        self.route: list[int] = Route.always(Path.INT4).flat()
        self.own = backend_for(CPU).prepare(weight) if own else None
        self.twin: Tensor | None = None
        self.twin_scales: Tensor | None = None
        self.bias: Tensor | None = None
        self.config = SimpleNamespace(zero_points=False)
        self.inner = object()
        self.fresh = False
        self.inner_calls = 0
        self._allocated(twin)

    def _allocated(self, twin: bool) -> None:
        kernel: Any = self
        build.allocate(kernel, "bfloat16" if twin else None)
        build.fill(kernel)

    def inner_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.inner_calls += 1
        return torch.nn.functional.linear(x, self.dense, None if bias is None else bias[self.inverse])

    def drop(self) -> None:
        self.own = self.twin = None


ROUTE = Route((0, 8, 16, 32), (Path.INT4, Path.INNER, Path.STREAM, Path.TWIN))


@pytest.mark.parametrize("path", list(Path))
@pytest.mark.parametrize(("own", "twin"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_path_adds_the_bias_that_the_inner_kernel_adds(path: Path, own: bool, twin: bool) -> None:
    kernel = Permuting(own=own, twin=twin)
    kernel.route = Route.always(path).flat()
    kernel.inner_calls = 0
    x = torch.randn(2, 3, K).to(torch.bfloat16)
    expected = torch.nn.functional.linear(x, kernel.dense, kernel.true_bias)
    found = op.run(kernel, x, kernel.layer.bias)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)
    torch.testing.assert_close(op.run(kernel, x, None), expected - kernel.true_bias, rtol=0.02, atol=0.1)
    ours = twin if path is Path.TWIN else own and path is not Path.INNER
    assert (kernel.inner_calls == 0) is ours


def test_our_kernels_agree_with_the_inner_one_on_every_path_of_the_route() -> None:
    kernel: Any = Permuting(own=True, twin=False)
    kernel.route = ROUTE.flat()
    kernel.inner_calls = 0
    assert own.agrees(kernel)
    assert kernel.inner_calls == 7 + 2  # of 1 to 7 rows and of 16 and 24


@pytest.mark.parametrize("path", [Path.INT4, Path.STREAM])
@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_kernel_of_ours_that_computes_something_else_is_found(
    path: Path, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel: Any = Permuting(own=True, twin=False)
    kernel.route = ROUTE.flat()
    right = own.int4_path
    monkeypatch.setattr(own, "int4_path", lambda p, *args: right(p, *args) * (wrong if p == path else 1.0))
    assert not own.agrees(kernel)
