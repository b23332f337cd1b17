"""One row times a large dense weight on a CPU, where torch's own product reads memory faster than oneDNN's.

128256 x 4096 in bf16 on two cores of an EPYC with AVX512_BF16, torch 2.13: 23 to 31 ms, as others leave it the memory; 52 to 65
by oneDNN, and 30 to 45 by oneDNN on a packed weight, as vLLM has it. From two rows on oneDNN is ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from twinweight.plan import MARGIN
from twinweight.timing import Timing, interleaved

LARGE = 64 << 20
"""Bytes of a weight from which the choice is worth a measurement; smaller ones may lie in a cache."""

_REPEATS = 4
_SAME = 1e-2  # share of a product's norm by which two roundings of it differ at most


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, K] @ weight [N, K].T without oneDNN: sums in fp32, rounded once.

    The switch is torch's, for the whole process: what other threads multiply meanwhile goes without oneDNN too.
    """
    with _WITHOUT:
        return torch.nn.functional.linear(x, weight)


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


@torch.inference_mode()
def times(weight: Tensor, other: Callable[[Tensor], Tensor]) -> tuple[Timing, Timing] | None:
    """What a row takes by `linear` and by `other`; None for a weight that is not chosen for: on a GPU, of 32 bits, small, or
    not the one that `other` multiplies with.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16) or weight.nbytes < LARGE:
        return None
    x = torch.randn(1, weight.shape[1]).to(weight.dtype)
    theirs = other(x)
    if not (linear(x, weight) - theirs).norm() <= _SAME * theirs.norm():
        return None
    found = interleaved({"ours": lambda: linear(x, weight), "other": lambda: other(x)}, device=x.device, repeats=_REPEATS)
    return found["ours"], found["other"]


def wins(ours: Timing, other: Timing) -> bool:
    """Whether the first is faster by more than the measurement's noise."""
    return ours.median * (1 + MARGIN) < other.min
