"""One row times a large dense weight on a CPU, where other products of torch's read memory faster than oneDNN's of matrices.

128256 x 4096 in bf16, torch 2.13. Two cores of an EPYC with AVX512_BF16: 23 to 31 ms without oneDNN, as others leave it the
memory; 52 to 65 by oneDNN, and 30 to 45 by oneDNN on a packed weight, as vLLM has it. Two cores of a Xeon with AMX: 38 by
oneDNN as a matrix times a vector, 49 as two matrices, 77 without it. From two rows on oneDNN's of matrices is ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from twinweight.plan import MARGIN
from twinweight.timing import Timing, interleaved

LARGE = 64 << 20
"""Bytes of a weight from which the choice is worth a measurement; smaller ones may lie in a cache."""

_REPEATS = 4
_SAME = 1e-2  # share of a product's norm by which two roundings of it differ at most

Product = Callable[[Tensor, Tensor], Tensor]
"""Of x [1, K] and weight [N, K]: x @ weight.T, [1, N], summed in fp32, rounded once."""


def without_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """A `Product`. The switch is torch's, for the whole process: what other threads multiply meanwhile goes without it too."""
    with _WITHOUT:
        return torch.nn.functional.linear(x, weight)


def as_vector(x: Tensor, weight: Tensor) -> Tensor:
    """A `Product`: the weight times a vector."""
    return torch.mv(weight, x[0])[None]


PRODUCTS: tuple[Product, ...] = (without_onednn, as_vector)


class _Without:
    """oneDNN off for as long as any thread is inside; then as it was before the first."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = bool(torch.backends.mkldnn.enabled)
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.mkldnn.enabled = self._before  # type: ignore[assignment]


_WITHOUT = _Without()


def is_large(weight: Tensor) -> bool:
    """Whether a weight is chosen for: 16 bits on a CPU, and large."""
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16) and weight.nbytes >= LARGE


@dataclass(frozen=True)
class Faster:
    """A product that is faster than another one, and what both took."""

    product: Product
    time: Timing
    other: Timing


@torch.inference_mode()
def faster(weight: Tensor, other: Callable[[Tensor], Tensor]) -> Faster | None:
    """The fastest of `PRODUCTS` for a row where it beats `other` by more than the measurement's noise. None, too, for a weight
    that is not chosen for: on a GPU, of 32 bits, small, or not the one that `other` multiplies with.
    """
    if not is_large(weight):
        return None
    x = torch.randn(1, weight.shape[1]).to(weight.dtype)
    theirs = other(x)
    same = [p for p in PRODUCTS if (p(x, weight) - theirs).norm() <= _SAME * theirs.norm()]
    calls = {p.__name__: (lambda p=p: p(x, weight)) for p in same}
    times = interleaved({**calls, "other": lambda: other(x)}, device=x.device, repeats=_REPEATS)
    return chosen(same, times)


def chosen(products: Iterable[Product], times: Mapping[str, Timing]) -> Faster | None:
    """By their times, each under its name, and the other's under "other"."""
    best = min(products, key=lambda p: times[p.__name__].median, default=None)
    if best is None or times[best.__name__].median * (1 + MARGIN) >= times["other"].min:
        return None
    return Faster(best, times[best.__name__], times["other"])
