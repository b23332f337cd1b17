"""A dense product of one row by other ways than oneDNN's of matrices."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close
from twinweight import one_row
from twinweight.engines.head import OutputHead
from twinweight.engines.vllm.heads import chosen, quicken
from twinweight.one_row import Product
from twinweight.timing import Timing


@pytest.mark.parametrize("product", one_row.PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_product_and_leaves_the_switch_alone(dtype: torch.dtype, product: Product) -> None:
    x, weight = torch.randn(1, 96).to(dtype), torch.randn(64, 96).to(dtype)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            y = product(x, weight)
            assert torch.backends.mkldnn.enabled is enabled
    assert_close(y, (x.double() @ weight.double().t()).to(dtype), max_err=1e-2)


def test_one_dnn_is_off_in_it_and_on_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def failing(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(bool(torch.backends.mkldnn.enabled))
        raise RuntimeError("no")

    monkeypatch.setattr(nn.functional, "linear", failing)
    with pytest.raises(RuntimeError, match="no"):
        one_row.without_onednn(torch.zeros(1, 8), torch.zeros(8, 8))
    assert (seen, bool(torch.backends.mkldnn.enabled)) == ([False], True)


def test_threads_that_overlap_leave_the_switch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to begin finds oneDNN off, and ends last."""
    inside, go_on = threading.Barrier(2), threading.Event()
    seen: list[bool] = []

    def slow(x: Tensor, weight: Tensor) -> Tensor:
        inside.wait()
        if threading.current_thread().name == "last":
            go_on.wait()
        seen.append(bool(torch.backends.mkldnn.enabled))
        return x

    monkeypatch.setattr(nn.functional, "linear", slow)
    threads = [
        threading.Thread(target=one_row.without_onednn, args=(torch.zeros(1), torch.zeros(1)), name=n)
        for n in ("first", "last")
    ]
    for thread in threads:
        thread.start()
    threads[0].join()
    assert bool(torch.backends.mkldnn.enabled) is False
    go_on.set()
    threads[1].join()
    assert seen == [False, False]
    assert bool(torch.backends.mkldnn.enabled) is True


def test_only_large_weights_of_16_bits_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def other(x: Tensor) -> Tensor:
        calls.append(x)
        return x

    def timed(calls: dict[str, Callable[[], object]], **how: object) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing(2.0, 2.0, 2.0) if name == "other" else Timing(1.0, 1.0, 1.0) for name in calls}

    monkeypatch.setattr(one_row, "interleaved", timed)
    assert one_row.faster(torch.zeros(64, 32, dtype=torch.bfloat16), other) is None
    monkeypatch.setattr(one_row, "LARGE", 1)
    assert one_row.faster(torch.zeros(64, 32), other) is None
    assert not calls
    weight = torch.randn(64, 32).bfloat16()
    assert one_row.faster(weight, lambda x: other(x) @ weight.t()) is not None
    assert {tuple(x.shape) for x in calls} == {(1, 32)}
    assert one_row.faster(weight, lambda x: x @ weight.flip(0).t()) is None


@pytest.mark.parametrize(
    ("without", "vector", "other", "expected"),
    [
        ((1.0, 0.9), (1.5, 1.4), (2.0, 1.9), 0),
        ((1.8, 1.0), (1.5, 1.4), (2.0, 1.9), 1),
        ((1.0, 0.5), (3.0, 3.0), (1.1, 1.01), None),
    ],
)
def test_the_fastest_is_chosen_and_never_by_noise(
    without: tuple[float, float], vector: tuple[float, float], other: tuple[float, float], expected: int | None
) -> None:
    times = {"without_onednn": Timing(*without, 4.0), "as_vector": Timing(*vector, 4.0), "other": Timing(*other, 4.0)}
    found = one_row.chosen(one_row.PRODUCTS, times)
    assert (found and found.product) == (None if expected is None else one_row.PRODUCTS[expected])
    assert one_row.chosen([], times) is None


class Head:
    """A head of vLLM's on a CPU."""

    def __init__(self) -> None:
        self.weight = torch.randn(64, 32).bfloat16()
        self.seen: list[int] = []
        self.cpu_linear = self.product

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.seen.append(len(x))
        return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("faster", [True, False])
def test_a_head_takes_a_single_row_alone_where_that_is_faster(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        alone.append(len(x))
        return nn.functional.linear(x, weight)

    times = one_row.Faster(product, Timing(1.0, 1.0, 1.0), Timing(2.0, 2.0, 2.0))
    monkeypatch.setattr(one_row, "faster", lambda weight, other: times if faster else None)
    head, ours = Head(), OutputHead(32, 64, bias=False).bfloat16()
    quicken([head])
    first = head.cpu_linear
    quicken([head])  # again after a reload that left it
    assert head.cpu_linear == first
    assert chosen([head]) == [faster]
    ours.choose()
    for rows in (1, 3):
        x = torch.randn(rows, 32).bfloat16()
        assert torch.equal(head.cpu_linear(x, head.weight, None), nn.functional.linear(x, head.weight))
        assert torch.equal(ours(x), nn.functional.linear(x, ours.weight))
    assert head.seen == ([3] if faster else [1, 3])
    assert alone == ([1, 1] if faster else [])
