"""The dense output head of a server on CPUs: one row, as in decode, by the product of torch's that measures faster, if any; on
request a few by the weight in 8 bits.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

from twinweight import one_row
from twinweight.formats.common import is_head
from twinweight.one_row import Product
from twinweight.rounded import Rounded, most_rows

log = logging.getLogger("vllm.twinweight")


def of(worker: Any) -> list[Any]:
    """Dense output heads on CPUs; their product, `cpu_linear(x, weight, bias)`, is an attribute."""
    named = worker.model_runner.get_model().named_modules(remove_duplicate=False)  # a tied one is an embedding, too
    return [m for name, m in named if is_head(name) and hasattr(m, "cpu_linear")]


def quicken(heads: list[Any], *, rounded: bool = False) -> None:
    """Choose by measurement how each head multiplies a single row, and with `rounded` whether a few go by its 8 bits. To be
    called again after a reload, which puts vLLM's product back, or writes into the weight.
    """
    refresh(heads)
    for head in heads:
        theirs = head.cpu_linear
        if isinstance(theirs, _Chosen):
            continue
        ways = _Chosen(theirs)
        found = one_row.faster(head.weight, functools.partial(theirs, weight=head.weight, bias=None))
        if found is not None:
            ways.alone = found.product
            ours, before = (f"{t.median * 1e3:.1f} ms" for t in (found.time, found.other))
            log.info("Twinweight: a row of the output head %s in %s, in place of %s", list(head.weight.shape), ours, before)
        if rounded and one_row.is_large(head.weight):
            ways.round(head.weight)
            size, nbytes = list(head.weight.shape), head.weight.numel()
            log.info("Twinweight: up to %d rows of the output head %s in 8 bits (%d MiB)", ways.most, size, nbytes >> 20)
        if ways.alone is not None or ways.most:
            head.cpu_linear = ways
    if rounded and not any(one_row.is_large(head.weight) for head in heads):
        log.info("Twinweight: no output head here that 8 bits would serve (16 bits, on a CPU, %d MiB)", one_row.LARGE >> 20)


def refresh(heads: list[Any]) -> None:
    """After other values were written into their weights."""
    for head in heads:
        if isinstance(head.cpu_linear, _Chosen):
            head.cpu_linear.refresh(head.weight)


def chosen(heads: list[Any]) -> list[bool]:
    """Which of them take few rows otherwise than vLLM does."""
    return [isinstance(head.cpu_linear, _Chosen) for head in heads]


class _Chosen:
    """vLLM's product, but for a single row, where there is a faster one (`alone`), and for up to `most` by 8 bits."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs
        self.alone: Product | None = None
        self.rounded: Rounded | None = None
        self.most = 0

    def round(self, weight: Tensor) -> None:
        """Take the weight's 8 bits for as many rows as they are faster for, if any."""
        rounded = Rounded(weight)
        self.most = most_rows(rounded, functools.partial(self, weight=weight, bias=None))
        self.rounded = rounded if self.most else None

    def refresh(self, weight: Tensor) -> None:
        """After other values were written into the weight."""
        if self.rounded is not None:
            self.rounded.refill(weight)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and x.dim() == 2:
            if self.rounded is not None and x.shape[0] <= self.most:
                return self.rounded(x)
            if self.alone is not None and x.shape[0] == 1:
                return self.alone(x, weight)
        return self.theirs(x, weight, bias)  # type: ignore[no-any-return]
