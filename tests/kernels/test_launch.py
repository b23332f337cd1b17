"""Launches that only compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from twinweight.kernels.launch import Launch, compiled_together


class Kernel:
    """Stands for a compiled function of Triton: kernel[grid](...) launches, warmup(...) compiles."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.seen.append(("launched", grid, args, options))

    def warmup(self, *args: object, grid: tuple[int, ...], **options: int) -> None:
        self.seen.append(("compiled", grid, args, options))


def test_inside_a_launch_compiles_with_the_same_arguments_and_computes_nothing() -> None:
    pytest.importorskip("triton")
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launch(kernel, (3, 1, 1), (4,), (True,), {"num_warps": 4}, x.device)
    with compiled_together():
        launch(x, None)
    launch(x, None)
    assert [what for what, *_ in kernel.seen] == ["compiled", "launched"]
    assert kernel.seen[0][1:] == kernel.seen[1][1:] == ((3, 1, 1), (x, None, 4, True), {"num_warps": 4})


def test_an_error_inside_ends_it() -> None:
    pytest.importorskip("triton")
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launch(kernel, (1, 1, 1), (), (), {}, x.device)
    with pytest.raises(RuntimeError, match="out of memory"), compiled_together():
        raise RuntimeError("out of memory")
    launch(x)
    assert kernel.seen[0][0] == "launched"
