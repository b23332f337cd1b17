"""The dense output head, in a form that never copies its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twinweight import one_row
from twinweight.few_rows import FewRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OutputHead(nn.Linear):
    """`nn.Linear` that flattens its input to rows first, and takes few by `FewRows` where those are faster.

    Generation asks for the logits of the last token only, a slice [batch, 1, K] whose strides do not fold; torch then
    multiplies in batches and copies the whole weight for it: 4.8 s of a 7.3 s prefill at a vocabulary of 128256 on 2 cores.
    """

    few: FewRows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        found = self.few(rows, self.weight) if self.few is not None and not torch.compiler.is_compiling() else None
        if found is None:
            found = nn.functional.linear(rows, self.weight, self.bias)
        return found.view(*x.shape[:-1], found.shape[-1])

    def choose(self, *, rounded: bool = False) -> None:
        """Measure how a single row is multiplied fastest, and with `rounded` how many rows go faster by 8 bits."""
        if self.bias is None:
            self.few = FewRows(self.weight, lambda x: nn.functional.linear(x, self.weight), rounded=rounded)


def rounded_bytes(model: PreTrainedModel) -> int:
    """Most bytes that the 8 bits of the model's output head would take on a CPU."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or head.weight.nbytes < one_row.LARGE:
        return 0
    return head.weight.numel() + head.out_features * head.weight.itemsize


def flatten_head(model: PreTrainedModel, *, rounded: bool = False) -> None:
    """Put an `OutputHead` on the model's own (perhaps tied) weight in place of a plain dense head. rounded: as in `choose`."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        return
    with torch.device("meta"):
        flat = OutputHead(head.in_features, head.out_features, bias=head.bias is not None)
    flat.weight, flat.bias = head.weight, head.bias
    flat.choose(rounded=rounded)
    model.set_output_embeddings(flat)  # type: ignore[no-untyped-call]
