"""How a large dense weight multiplies few rows on a CPU: one as measures fastest, on request some by the weight in 8 bits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from twinweight import one_row
from twinweight.rounded import Rounded, most_rows


class FewRows:
    """What was chosen for a weight [N, K] beside `other`, which multiplies x [M, K] with it as before.

    alone: the faster product of one row, with the times of both; None for none. rounded: on request the weight in 8 bits, which
    serve up to `most` rows; None where they are not faster for any.
    """

    def __init__(self, weight: Tensor, other: Callable[[Tensor], Tensor], *, rounded: bool) -> None:
        self.alone = one_row.faster(weight, other)
        self.rounded: Rounded | None = None
        self.most = 0
        if rounded and one_row.is_large(weight):
            bits = Rounded(weight)
            self.most = most_rows(bits, lambda x: other(x) if (y := self(x, weight)) is None else y)
            self.rounded = bits if self.most else None

    @property
    def serve(self) -> bool:
        """Whether any rows go otherwise than by the other product."""
        return self.alone is not None or self.rounded is not None

    def refresh(self, weight: Tensor) -> None:
        """After other values were written into the weight."""
        if self.rounded is not None:
            self.rounded.refill(weight)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """x: [M, K] -> [M, N], or None where the other product is to be taken."""
        if self.rounded is not None and x.shape[0] <= self.most:
            return self.rounded(x)
        if self.alone is not None and x.shape[0] == 1:
            return self.alone.product(x, weight)
        return None
