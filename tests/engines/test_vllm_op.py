"""The op inside a vLLM layer: which kernel serves which path, and with which bias. Needs no vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import random_weight
from twinweight import paths
from twinweight.engines.vllm import build, op, own
from twinweight.engines.vllm.layout import CpuLayout
from twinweight.kernels import backend_for, gpu
from twinweight.paths import Path, Route
from twinweight.steps import Step, Steps

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
        self.route = Route.always(Path.INT4).flat()
        self.own = backend_for(CPU).prepare(weight) if own else None
        self.twin: Tensor | None = None
        self.twin_scales: Tensor | None = None
        self.twin_t: Tensor | None = None
        self.scales_t: Tensor | None = None
        self.bias: Tensor | None = None
        self.config = SimpleNamespace(zero_points=False)
        self.inner = object()
        self.fresh = False
        self.inner_calls = 0
        self._allocated(twin)

    @property
    def route(self) -> list[int]:
        return self._route

    @route.setter
    def route(self, flat: list[int]) -> None:
        self._route = flat
        self.steps: Steps = {}

    def _allocated(self, twin: bool) -> None:
        kernel: Any = self
        build.allocate(kernel, "bfloat16" if twin else "own")
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


@pytest.mark.parametrize("path", list(Path))
def test_a_number_of_rows_met_before_takes_the_same_path(path: Path) -> None:
    """By what was kept of the first time, which x of another size, of more dimensions or under a profiler does not go by."""
    kernel = Permuting(own=True, twin=True)
    kernel.route = Route.always(path).flat()
    x = torch.randn(4, K).to(torch.bfloat16)
    before = paths.calls[path, 4]
    odd = torch.empty(4 * K + 1, dtype=torch.bfloat16)[1:].view(4, K).copy_(x)
    others = op.run(kernel, odd, None), op.run(kernel, x.t().contiguous().t(), None)
    assert kernel.steps == {}  # nothing is worked out for calls that lie as few do
    first, again, turned = op.run(kernel, x, None), op.run(kernel, x, None), op.run(kernel, x.t().contiguous().t(), None)
    assert torch.equal(first, again)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.02, atol=0.1)
    torch.testing.assert_close(turned, first, rtol=0.02, atol=0.1)
    assert list(kernel.steps) == [4]
    with torch.profiler.profile() as profile:
        op.run(kernel, x, None)
    assert f"twinweight::{path.name.lower()} 4x{N}x{K}" in {e.key for e in profile.key_averages()}
    assert torch.equal(op.run(kernel, x[None], None)[0], first)
    assert paths.calls[path, 4] - before == 7


@pytest.mark.parametrize("path", [Path.FUSED, Path.TWIN])
def test_a_number_of_rows_met_before_launches_what_was_worked_out(path: Path) -> None:
    """From an own weight or, in 8 bits, from the twin; nothing else than a call that it fits, and nothing that is gone."""
    kernel = Permuting(own=path is Path.FUSED, twin=path is Path.TWIN)
    kernel.route = Route.always(path).flat()
    weight: Any = (kernel.own, None)
    if path is Path.TWIN:
        assert kernel.twin is not None
        data, scales = (kernel.twin * 16).to(torch.int8), torch.full((N,), 1 / 16)
        kernel.twin, kernel.twin_scales = data, scales
        weight = kernel.twin_t, kernel.scales_t = data.t(), scales[None]
    launched: list[Any] = []
    kernel.steps[4] = Step(path, (path, 4), lambda x, *w: launched.append(w) or x)
    x = torch.randn(4, K).to(torch.bfloat16)
    assert op.run(kernel, x, None) is x
    odd = torch.empty(4 * K + 1, dtype=torch.bfloat16)[1:].view(4, K)
    for other, bias in ((x, kernel.layer.bias), (x.t().contiguous().t(), None), (odd, None)):
        op.run(kernel, other, bias)
    kernel.own = kernel.twin = kernel.twin_t = None
    op.run(kernel, x, None)
    assert launched == [weight]


def test_the_twin_of_a_gpu_is_multiplied_as_it_lies() -> None:
    """Where it was dropped, the inner kernel goes on."""
    kernel = Permuting(own=False, twin=True)
    kernel.route = Route.always(Path.TWIN).flat()
    assert kernel.twin is not None
    kernel.twin_t = (kernel.twin * 2).t()
    x = torch.randn(4, K).to(torch.bfloat16)
    expected = torch.nn.functional.linear(x, kernel.dense)
    torch.testing.assert_close(op.run(kernel, x, None), expected, rtol=0.02, atol=0.1)
    torch.testing.assert_close(op.run(kernel, x, None), 2 * expected, rtol=0.02, atol=0.2)
    kernel.twin = kernel.twin_t = None
    torch.testing.assert_close(op.run(kernel, x, None), expected, rtol=0.02, atol=0.1)


def test_our_kernels_agree_with_a_dense_product_on_every_path_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the inner kernel, which may round partial sums."""
    kernel: Any = Permuting(own=True, twin=False)
    kernel.route = ROUTE.flat()
    right, tried = own.int4_path, []
    monkeypatch.setattr(own, "int4_path", lambda p, x, *args: tried.append((p, len(x))) or right(p, x, *args))
    assert own.agrees(kernel)
    assert tried == [*((Path.INT4, m) for m in range(1, 8)), (Path.STREAM, 16), (Path.STREAM, 24)]


def test_a_kernel_of_ours_that_does_not_run_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kernel: Any = Permuting(own=True, twin=False)
    kernel.route = ROUTE.flat()

    def broken(*args: object) -> Tensor:
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(own, "int4_path", broken)
    assert not own.agrees(kernel)
    assert "int4 does not run with 1 rows" in caplog.text


def test_a_copy_with_zero_points_takes_weights_that_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory that sleeping threw away holds looks like that, too."""
    asymmetric, symmetric = (backend_for(CPU).prepare(random_weight(N, K, 64, symmetric=s)) for s in (False, True))
    as_gpu = dataclasses.replace(asymmetric, zeros=torch.full((N, K // 64), 3, dtype=torch.int16))
    kernel: Any = SimpleNamespace(own=as_gpu, device=torch.device("cuda"))
    monkeypatch.setattr(own, "make", lambda kernel: dataclasses.replace(symmetric, scales=as_gpu.scales * 2))
    address = as_gpu.packed.data_ptr()
    own.refill(kernel)
    assert kernel.own is as_gpu
    assert as_gpu.packed.data_ptr() == address
    assert torch.equal(as_gpu.packed, symmetric.packed)
    assert (as_gpu.zeros == 8).all()
    kernel.own = symmetric
    monkeypatch.setattr(own, "make", lambda kernel: as_gpu)
    with pytest.raises(RuntimeError, match="start the server anew"):
        own.refill(kernel)


@pytest.mark.parametrize("asked", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("found", [False, True], ids=["found symmetric", "found zero points"])
def test_a_copy_on_a_gpu_is_written_where_it_was_allocated(asked: bool, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu.prepare(random_weight(N, K, 64, symmetric=not found))
    config = SimpleNamespace(zero_points=asked, group_size=64)
    kernel: Any = SimpleNamespace(own=None, n=N, k=K, dtype=torch.bfloat16, device=torch.device("cuda"), config=config)
    monkeypatch.setattr(own.gpu, "empty", functools.partial(as_if_on_a_gpu, gpu.empty))
    monkeypatch.setattr(own, "make", lambda kernel: made)
    own.allocate(kernel)
    place = kernel.own.packed
    assert kernel.own.nbytes == gpu.weight_bytes(N, K, 64, False, not asked)
    assert own.fill(kernel) is (asked or not found)
    if asked or not found:
        assert kernel.own.packed is place
        dense, expected = torch.empty(N, K, dtype=torch.bfloat16), torch.empty(N, K, dtype=torch.bfloat16)
        gpu.expand(kernel.own, dense)
        gpu.expand(made, expected)
        assert torch.equal(dense, expected)
    monkeypatch.setattr(own, "make", lambda kernel: None)
    assert not own.fill(kernel)
    assert kernel.own is None


@pytest.mark.parametrize(
    ("error", "raised"), [(NotImplementedError("no such GPU"), False), (torch.OutOfMemoryError("out"), True)]
)
def test_a_copy_that_no_kernel_can_make_is_none(
    error: Exception, raised: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(kernel: object) -> None:
        raise error

    kernel: Any = Permuting(own=True, twin=False)
    monkeypatch.setattr(own, "make", failing)
    with pytest.raises(torch.OutOfMemoryError) if raised else contextlib.nullcontext():
        assert not own.fill(kernel)
        assert kernel.own is None
        assert "cannot be read back" in caplog.text


def test_without_memory_to_compare_them_copies_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kernel: Any = Permuting(own=True, twin=False)
    kernel.route = ROUTE.flat()

    def full(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for of, name in ((own, "int4_path"), (own.identity, "dense")):
        with monkeypatch.context() as patch:
            patch.setattr(of, name, full)
            assert own.agrees(kernel)
            assert "no memory to compare" in caplog.text
            caplog.clear()


def as_if_on_a_gpu(empty: Any, n: int, k: int, group: int, dtype: torch.dtype, device: object, *, symmetric: bool) -> Any:
    return empty(n, k, group, dtype, CPU, symmetric=symmetric)


def test_a_copy_that_new_weights_do_not_fit_goes_on_a_cpu_and_its_twin_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = Permuting(own=True, twin=True)
    monkeypatch.setattr(own, "make", lambda kernel: None)
    own.refill(kernel)
    assert kernel.own is None
    assert kernel.twin is not None
    kernel.route = ROUTE.flat()
    for m, inner in ((1, 1), (16, 1), (32, 0)):
        kernel.inner_calls = 0
        op.run(kernel, torch.randn(m, K).to(torch.bfloat16), None)
        assert kernel.inner_calls == inner


@pytest.mark.parametrize("path", [Path.INT4, Path.STREAM])
@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_kernel_of_ours_that_computes_something_else_is_found(
    path: Path, wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel: Any = Permuting(own=True, twin=False)
    kernel.route = ROUTE.flat()
    right = own.int4_path
    monkeypatch.setattr(own, "int4_path", lambda p, *args: right(p, *args) * (wrong if p == path else 1.0))
    assert not own.agrees(kernel)
    assert f"{path.name.lower()} with {1 if path == Path.INT4 else 16} rows is off by" in caplog.text


@pytest.mark.parametrize(("order", "known"), [((), True), ((None,), True), ((torch.arange(K),), False)])
def test_the_layout_of_vllm_s_cpu_kernel_is_read_in_each_version_and_not_with_act_order(
    order: tuple[Tensor | None, ...], known: bool
) -> None:
    """Up to 0.31 the kernel names four parameters, the last the groups of act-order's columns."""
    tensors = torch.zeros(N // 16, 2 * K, dtype=torch.int32), torch.ones(K // 64, N), None
    CPUWNA16LinearKernel = type("CPUWNA16LinearKernel", (), {"_get_weight_params": lambda self, layer: (*tensors, *order)})
    inner: Any = CPUWNA16LinearKernel()
    inner.config = SimpleNamespace(weight_type=SimpleNamespace(size_bits=4))
    kernel: Any = SimpleNamespace(inner=inner, n=N, k=K, layer=SimpleNamespace(use_w4a8=False))
    assert (CpuLayout.of(kernel) is not None) is known
