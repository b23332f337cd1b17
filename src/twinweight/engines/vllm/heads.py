"""The dense output head of a server on CPUs: one row, as in decode, by the product of torch's that measures faster, if any; on
request a few by the weight in 8 bits.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

from twinweight import one_row
from twinweight.few_rows import FewRows
from twinweight.formats.common import is_head

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
        few = FewRows(head.weight, functools.partial(theirs, weight=head.weight, bias=None), rounded=rounded)
        size = list(head.weight.shape)
        if few.alone is not None:
            ours, before = (f"{t.median * 1e3:.1f} ms" for t in (few.alone.time, few.alone.other))
            log.info("Twinweight: a row of the output head %s in %s, in place of %s", size, ours, before)
        if rounded and one_row.is_large(head.weight):
            nbytes = head.weight.numel()
            log.info("Twinweight: up to %d rows of the output head %s in 8 bits (%d MiB)", few.most, size, nbytes >> 20)
        if few.serve:
            head.cpu_linear = _Chosen(theirs, few)
    if rounded and not any(one_row.is_large(head.weight) for head in heads):
        log.info("Twinweight: no output head here that 8 bits would serve (16 bits, on a CPU, %d MiB)", one_row.LARGE >> 20)


def refresh(heads: list[Any]) -> None:
    """After other values were written into their weights."""
    for head in heads:
        if isinstance(head.cpu_linear, _Chosen):
            head.cpu_linear.few.refresh(head.weight)


def chosen(heads: list[Any]) -> list[bool]:
    """Which of them take few rows otherwise than vLLM does."""
    return [isinstance(head.cpu_linear, _Chosen) for head in heads]


class _Chosen:
    """vLLM's product, but for few rows."""

    def __init__(self, theirs: Any, few: FewRows) -> None:
        self.theirs, self.few = theirs, few

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = self.few(x, weight) if bias is None and x.dim() == 2 else None
        return self.theirs(x, weight, bias) if found is None else found
