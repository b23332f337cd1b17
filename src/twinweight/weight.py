"""`Int4Weight`: the one form into which every checkpoint format is read, and its exact meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SYMMETRIC_ZERO = 8
"""Zero point of a symmetric weight: stored values 0..15 stand for -8..7."""


@dataclass(frozen=True)
class Int4Weight:
    """A linear weight [N, K] of 4-bit integers in groups of `group_size` input features.

    Its meaning is exact: column k of row n is `(q[n, k] - zeros[n, g]) * scales[n, g]` with `g = g_idx[k]`,
    rounded once where it is stored in 16 bits.

    packed: int32 [N, ceil(K / 8)]; bits 4j..4j+3 of word i are column 8i + j, as unsigned 0..15 (the layout of
        compressed-tensors `pack-quantized`); nibbles past K are ignored.
    scales: bf16 or fp16 [N, K / group_size].
    zeros: uint8 [N, K / group_size] in 0..15, or None for symmetric (8 everywhere).
    g_idx: int32 [K], the group of each column, or None for `k // group_size` (act-order checkpoints store one).
    group_size: columns in a group; K for one scale a row ("per channel").
    in_features: K.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    group_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.packed, self.scales, self.zeros, self.g_idx)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def values(self) -> Tensor:
        """The stored integers 0..15 as uint8 [N, K]."""
        return unpack_nibbles(self.packed)[:, : self.in_features]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], rounded once to `dtype` (default: that of the scales). For tests and small weights."""
        group = self.g_idx.long() if self.g_idx is not None else torch.arange(self.in_features) // self.group_size
        group = group.to(self.packed.device)
        zero = self.zeros.double()[:, group] if self.zeros is not None else float(SYMMETRIC_ZERO)
        return ((self.values().double() - zero) * self.scales.double()[:, group]).to(dtype or self.scales.dtype)

    def rows(self, start: int, stop: int) -> Int4Weight:
        """Output features start..stop-1, as views (one module out of a fused weight)."""
        zeros = self.zeros[start:stop] if self.zeros is not None else None
        return replace(self, packed=self.packed[start:stop], scales=self.scales[start:stop], zeros=zeros)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Int4Weight:
        """On another device, or with scales in another dtype (rounded once)."""
        return replace(
            self,
            packed=self.packed.to(device),
            scales=self.scales.to(device, dtype) if dtype else self.scales.to(device),
            zeros=self.zeros.to(device) if self.zeros is not None else None,
            g_idx=self.g_idx.to(device) if self.g_idx is not None else None,
        )


def concat_rows(parts: Sequence[Int4Weight]) -> Int4Weight:
    """One weight from several over the same input features (q, k and v into a fused qkv).

    Raises ValueError where the parts differ in K, group size, symmetry or column order.
    """
    first = parts[0]
    for p in parts[1:]:
        same = (p.in_features, p.group_size, p.zeros is None) == (first.in_features, first.group_size, first.zeros is None)
        order = (p.g_idx is None and first.g_idx is None) or (
            p.g_idx is not None and first.g_idx is not None and torch.equal(p.g_idx, first.g_idx)
        )
        if not (same and order):
            raise ValueError(f"cannot join weights {[q.shape for q in parts]}: K, group size, symmetry or act-order differ")
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return replace(
        first,
        packed=torch.cat([p.packed for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def from_values(
    values: Tensor, scales: Tensor, zeros: Tensor | None = None, g_idx: Tensor | None = None, *, group_size: int
) -> Int4Weight:
    """Build from plain integers. values: [N, K] in 0..15 of any integer dtype; the rest as in `Int4Weight`.

    A `g_idx` that says no more than `k // group_size` is dropped.
    """
    k = values.shape[1]
    if g_idx is not None and torch.equal(g_idx.cpu().long(), torch.arange(k) // group_size):
        g_idx = None
    return Int4Weight(pack_nibbles(values), scales, zeros, g_idx, group_size, k)


def pack_nibbles(values: Tensor) -> Tensor:
    """[N, K] integers 0..15 -> int32 [N, ceil(K / 8)], column 8i + j in bits 4j..4j+3 of word i."""
    octets = torch.nn.functional.pad(values.to(torch.uint8), (0, -values.shape[1] % 8)).contiguous()
    return (octets[:, ::2] | octets[:, 1::2] << 4).view(torch.int32)  # little-endian, as in `unpack_nibbles`


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [N, W] -> uint8 [N, 8W], the inverse of `pack_nibbles`."""
    octets = words.contiguous().view(torch.uint8)  # little-endian: byte b of a word holds columns 2b and 2b + 1
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
