"""The dense output head, in a form that never copies its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twinweight import one_row
from twinweight.one_row import Product
from twinweight.rounded import Rounded, most_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OutputHead(nn.Linear):
    """`nn.Linear` that flattens its input to rows first, and takes a single one by `alone` where there is that.

    Generation asks for the logits of the last token only, a slice [batch, 1, K] whose strides do not fold; torch then
    multiplies in batches and copies the whole weight for it: 4.8 s of a 7.3 s prefill at a vocabulary of 128256 on 2 cores.
    """

    alone: Product | None = None
    rounded: Rounded | None = None
    most = 0

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        compiling = torch.compiler.is_compiling()
        if self.rounded is not None and rows.shape[0] <= self.most and not compiling:
            found = self.rounded(rows)
        elif self.alone is not None and rows.shape[0] == 1 and not compiling:
            found = self.alone(rows, self.weight)
        else:
            found = nn.functional.linear(rows, self.weight, self.bias)
        return found.view(*x.shape[:-1], found.shape[-1])

    def choose(self, *, rounded: bool = False) -> None:
        """Measure how a single row is multiplied fastest, and with `rounded` how many rows go faster by 8 bits."""
        if self.bias is None and (found := one_row.faster(self.weight, lambda x: nn.functional.linear(x, self.weight))):
            self.alone = found.product
        if rounded and self.bias is None and one_row.is_large(self.weight):
            bits = Rounded(self.weight)
            self.most = most_rows(bits, self)
            self.rounded = bits if self.most else None


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
