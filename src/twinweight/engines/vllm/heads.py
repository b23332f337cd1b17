"""The dense output head of a server on CPUs: one row, as in decode, by the product of torch's that measures faster, if any."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

from twinweight import one_row
from twinweight.formats.common import is_head
from twinweight.one_row import Product

log = logging.getLogger("vllm.twinweight")


def of(worker: Any) -> list[Any]:
    """Dense output heads on CPUs; their product, `cpu_linear(x, weight, bias)`, is an attribute."""
    named = worker.model_runner.get_model().named_modules(remove_duplicate=False)  # a tied one is an embedding, too
    return [m for name, m in named if is_head(name) and hasattr(m, "cpu_linear")]


def quicken(heads: list[Any]) -> None:
    """Choose by measurement how each head multiplies a single row. To be called again after a reload, which puts vLLM's
    product back.
    """
    for head in heads:
        theirs = head.cpu_linear
        if isinstance(theirs, _Chosen):
            continue
        found = one_row.faster(head.weight, functools.partial(theirs, weight=head.weight, bias=None))
        if found is not None:
            head.cpu_linear = _Chosen(theirs, found.product)
            ours, before = (f"{t.median * 1e3:.1f} ms" for t in (found.time, found.other))
            log.info("Twinweight: a row of the output head %s in %s, in place of %s", list(head.weight.shape), ours, before)


def chosen(heads: list[Any]) -> list[bool]:
    """Which of them take a single row otherwise than vLLM does."""
    return [isinstance(head.cpu_linear, _Chosen) for head in heads]


class _Chosen:
    """vLLM's product, but for a single row."""

    def __init__(self, theirs: Any, alone: Product) -> None:
        self.theirs, self.alone = theirs, alone

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and x.dim() == 2 and x.shape[0] == 1:
            return self.alone(x, weight)
        return self.theirs(x, weight, bias)  # type: ignore[no-any-return]
