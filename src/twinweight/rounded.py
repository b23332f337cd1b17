"""A large dense weight in 8 bits, beside itself, for few rows on a CPU: their time is that of reading it, and these are half.

One scale a row, a value of the weight's dtype; the weight is off by half a scale at most, and activations stay as they are.
Opt-in, as it rounds. 128256 x 4096, torch 2.13, two cores of a Xeon with AMX: 21 ms for a row where bf16 takes 42, 27 for four,
and 52 beside 43 for eight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from twinweight.asked import given_or_set, one_of
from twinweight.plan import MARGIN
from twinweight.timing import interleaved

VARIABLE = "TWINWEIGHT_HEAD"
REQUESTS = ("dense", "int8")
"""Of an output head: as it is, or besides in 8 bits."""

_WHAT = "output head"

_TOP = 127
_TINY = 1e-30  # the scale of a row of zeros
_CHUNK = 4 << 20  # values that are rounded at a time, in fp32
_ROWS = (1, 2, 4, 8)  # that are timed; torch's product takes rows one by one, or nearly so
_REPEATS = 4
_SAME = 0.05  # share of a product's norm by which 8 bits move it at most; 0.009 on normal weights


def check_request(value: str) -> str:
    """`value`, one of `REQUESTS`. Raises ConfigError naming them."""
    return one_of(_WHAT, value, REQUESTS)


def request(given: str | None, environ: Mapping[str, str] | None = None) -> str:
    """What is asked for: `given`, else TWINWEIGHT_HEAD, else "dense". Raises ConfigError for a value that is not known."""
    return given_or_set(_WHAT, given, VARIABLE, REQUESTS, environ)


class Rounded:
    """The 8 bits of a weight, bf16 or fp16 [N, K] on a CPU: data int8 [N, K], scales [N] of its dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.data = torch.empty(weight.shape, dtype=torch.int8)
        self.scales = torch.empty(weight.shape[0], dtype=weight.dtype)
        self.refill(weight)

    def refill(self, weight: Tensor) -> None:
        """Round the weight anew, in place."""
        step = max(1, _CHUNK // max(1, weight.shape[1]))
        for rows in range(0, len(weight), step):
            part = slice(rows, rows + step)
            values = weight[part].float()
            scales = self.scales[part].copy_((values.abs().amax(1) / _TOP).clamp_(min=_TINY))
            self.data[part] = values.div_(scales.float().unsqueeze(1)).round_().clamp_(-_TOP, _TOP)

    def dense(self) -> Tensor:
        """The weight that products see, of its dtype [N, K]."""
        return (self.data.float() * self.scales.float().unsqueeze(1)).to(self.scales.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K], contiguous rows of the weight's dtype -> [M, N], summed in fp32."""
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.data, self.scales)  # type: ignore[no-any-return]


@torch.inference_mode()
def most_rows(rounded: Rounded, exact: Callable[[Tensor], Tensor]) -> int:
    """Rows up to which it beats the exact product [M, K] -> [M, N] by more than the measurement's noise; 0: never, or another
    product: somebody may multiply with a weight of his own, or with one that 8 bits cannot hold.
    """
    most = 0
    for m in _ROWS:
        x = torch.randn(m, rounded.data.shape[1]).to(rounded.scales.dtype)
        expected = exact(x).float()
        if not (rounded(x).float() - expected).norm() <= _SAME * expected.norm():
            break
        calls = {"rounded": lambda x=x: rounded(x), "exact": lambda x=x: exact(x)}
        times = interleaved(calls, device=x.device, repeats=_REPEATS)
        if times["rounded"].median * (1 + MARGIN) >= times["exact"].min:
            break
        most = m
    return most
