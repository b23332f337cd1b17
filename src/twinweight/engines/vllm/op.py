"""The opaque op of a wrapped layer: it sees the real number of rows, at run time, and calls the inner kernel or the twin.

It takes a handle, not the twin: a twin as an argument makes layers with and without one different graphs (measured with 9 of
16 twins: 4 compiled artifacts, not 3) and the plan a part of what is compiled. With a handle, a number in a CPU tensor that no
trace looks into, all layers of a shape share one graph whatever the plan, and a twin can be dropped after compiling.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from twinweight.kernels import dense_linear
from twinweight.paths import Path, count, pick


class Paths(Protocol):
    """What the op asks of a kernel."""

    route: list[int]
    twin: Tensor | None
    twin_bias: Tensor | None

    def inner_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By vLLM's own kernel."""


_paths: dict[int, Callable[[], Paths | None]] = {}
_numbers = itertools.count()


def handle_for(kernel: Paths) -> Tensor:
    """A handle of a kernel, which it does not keep alive: 0-dimensional int64 on the CPU, so reading it waits for no device."""
    number = next(_numbers)
    _paths[number] = weakref.ref(kernel)
    weakref.finalize(kernel, _paths.pop, number, None)
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def kernels() -> list[Paths]:
    """The kernels that live."""
    return [k for k in (ref() for ref in list(_paths.values())) if k is not None]


def linear(x: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x: [..., K] -> [..., N] by the path that the kernel's route names for the product of x's leading sizes."""
    kernel = _paths[int(handle)]()
    if kernel is None:
        raise RuntimeError("the layer of this handle is gone")
    m = x.numel() // x.shape[-1]
    path = pick(kernel.route, m)
    count(path, m)
    if path == Path.TWIN and kernel.twin is not None:
        return dense_linear(x, kernel.twin, None if bias is None else kernel.twin_bias)
    # Some kernels pad N and return a slice; the traced graph counts on dense rows.
    return kernel.inner_linear(x, bias).contiguous()


def _fake(x: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


_library = torch.library.Library("twinweight", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("vllm_linear(Tensor x, Tensor handle, Tensor? bias, int n) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("vllm_linear", linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("twinweight::vllm_linear", _fake, lib=_library)
