"""The packed layout of vLLM's CPU kernel, the one inner layout that we read."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.weight import unpack_nibbles


@dataclass(frozen=True)
class CpuLayout:
    """words [N/16, 2K] int32, blocks of 16 outputs with 8 bytes for each k, low nibble first; scales [K/G, N]; zeros
    [K/G, N/8] int32, or None for 8.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    @staticmethod
    def of(kernel: Wrapped) -> CpuLayout | None:
        """None where the inner kernel is another, or keeps another layout (int8 activations, act-order)."""
        inner, n, k = kernel.inner, kernel.n, kernel.k
        if type(inner).__name__ != "CPUWNA16LinearKernel" or getattr(kernel.layer, "use_w4a8", True):
            return None
        words, scales, zeros, *order = inner._get_weight_params(kernel.layer)  # the last up to vLLM 0.31
        if any(one is not None for one in order):
            return None
        known = words.shape == (n // 16, 2 * k) and scales.shape[1] == n and k % scales.shape[0] == 0
        return CpuLayout(words, scales, zeros) if known and inner.config.weight_type.size_bits == 4 else None

    @property
    def group_size(self) -> int:
        """Input features that share a scale."""
        return self.words.shape[1] // 2 // self.scales.shape[0]

    def rows(self, start: int, stop: int) -> CpuLayout:
        """Output features start to stop, multiples of 16."""
        zeros = self.zeros[:, start // 8 : stop // 8].contiguous() if self.zeros is not None else None
        return CpuLayout(self.words[start // 16 : stop // 16], self.scales[:, start:stop].contiguous(), zeros)

    def values(self) -> Tensor:
        """The 4-bit values, uint8 [N, K]. Bytes are turned before they are unpacked: they are fewer, and one byte each."""
        pairs = self.words.contiguous().view(torch.uint8).view(len(self.words), -1, 8).transpose(1, 2).contiguous()
        values = torch.empty(len(pairs), 16, pairs.shape[2], dtype=torch.uint8)
        values[:, 0::2], values[:, 1::2] = pairs & 15, pairs >> 4
        return values.flatten(0, 1)

    def zero_points(self) -> Tensor | None:
        """uint8 [K/G, N], or None where all are 8."""
        return None if self.zeros is None else unpack_nibbles(self.zeros)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K]. The kernel rounds (q - z) * s to the activation dtype before its GEMM, and so must a wider twin."""
        zeros = self.zero_points()
        q = self.values().view(torch.int8).view(self.scales.shape[1], self.scales.shape[0], -1)
        q.sub_(8 if zeros is None else zeros.view(torch.int8).t().unsqueeze(-1))
        return q.float().mul_(self.scales.float().t().contiguous().unsqueeze(-1)).to(dtype).flatten(1)


def slice_of(kernel: Wrapped, n: int) -> Any:
    """A stand-in for the layer with its first n outputs, n a multiple of 32, to time; None where the layout is not known."""
    layout = CpuLayout.of(kernel)
    if layout is None:
        return None
    part, inner = layout.rows(0, n), kernel.inner
    names: dict[str, Tensor | None] = {inner.w_q_name: part.words, inner.w_s_name: part.scales}
    if inner.w_zp_name:
        names[inner.w_zp_name] = part.zeros
    return SimpleNamespace(use_w4a8=False, isa_hint=kernel.layer.isa_hint, **names)
