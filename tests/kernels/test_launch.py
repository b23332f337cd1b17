"""Launches that only compile."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch

from twinweight.kernels.launch import FUSING, Launch, compile_together

pytest.importorskip("triton")
X = torch.zeros(4)


class Kernel:
    """Stands for a compiled function of Triton: kernel[grid](...) launches, warmup(...) compiles."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.seen.append(("launched", grid, args, options))

    def warmup(self, *args: object, grid: tuple[int, ...], **options: int) -> None:
        self.seen.append(("compiled", grid, args, options))


def test_a_launch_compiles_with_the_same_arguments_and_computes_nothing() -> None:
    kernel = Kernel()
    launch = Launch(kernel, (3, 1, 1), (4,), (True,), {"num_warps": 4}, X.device)
    compile_together([partial(launch, X, None)])
    launch(X, None)
    assert [what for what, *_ in kernel.seen] == ["compiled", "launched"]
    assert kernel.seen[0][1:] == kernel.seen[1][1:] == ((3, 1, 1), (X, None, 4, True), {"num_warps": 4, **FUSING})


def test_what_fails_is_said_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel()
    launch = Launch(kernel, (1, 1, 1), (), (), {}, X.device)

    def short() -> None:
        raise torch.OutOfMemoryError("no memory for an output")

    with caplog.at_level(logging.INFO, "twinweight"):
        compile_together([short, partial(launch, X)])
    launch(X)
    assert "no memory for an output" in caplog.text
    assert [what for what, *_ in kernel.seen] == ["launched"]


def test_what_triton_does_not_tell_apart_is_compiled_once() -> None:
    kernel, other = Kernel(), Kernel()

    def launch(on: Kernel, rows: int, option: int = 4) -> Launch:
        return Launch(on, (rows, 1, 1), (rows, 64), (True,), {"num_warps": option}, X.device)

    calls = [launch(kernel, 3), launch(kernel, 5), launch(kernel, 16), launch(kernel, 32), launch(kernel, 1)]
    calls += [launch(kernel, 3, option=8), launch(other, 3)]
    compile_together(
        [partial(call, X) for call in calls] + [partial(calls[0], X.to(torch.float64)), partial(calls[0], None, X)]
    )
    assert [args[-3] for _, _, args, _ in kernel.seen] == [3, 16, 1, 3, 3, 3]
    assert len(other.seen) == 1
    compile_together([partial(calls[0], X)])
    assert len(kernel.seen) == 7
