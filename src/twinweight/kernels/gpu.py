"""The GPU paths, in Triton. The int4 weight keeps the layout of `Int4Weight`, with the columns of a group side by side."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from twinweight.kernels.padding import cliff_bytes as cliff
from twinweight.kernels.padding import empty_padded, padded_stride
from twinweight.kernels.prepared import TILE_BYTES, KernelWeight, group_order
from twinweight.paths import Path
from twinweight.weight import Int4Weight, pack_nibbles, unpack_nibbles


def prepare(weight: Int4Weight) -> KernelWeight:
    """As it is, without a copy; act-order weights with their columns sorted by group."""
    perm = group_order(weight)
    packed = weight.packed if perm is None else _permuted(weight.packed, perm)
    n, k = weight.shape
    zeros = weight.zeros.contiguous() if weight.zeros is not None else None
    return KernelWeight(packed.contiguous(), weight.scales.contiguous(), zeros, perm, weight.group_size, n, k)


def unprepare(w: KernelWeight, *, symmetric: bool, group_size: int) -> Int4Weight:
    """The `Int4Weight` that `prepare` took."""
    weight = Int4Weight(w.packed, w.scales, w.zeros, None, group_size, w.k)
    if w.perm is None:
        return weight
    inverse = torch.argsort(w.perm)
    g_idx = (inverse // group_size).to(torch.int32)
    return replace(weight, packed=_permuted(w.packed, inverse), g_idx=g_idx)


def weight_bytes(n: int, k: int, group_size: int, act_order: bool, symmetric: bool) -> int:
    """Bytes of what `prepare` returns."""
    return n * -(-k // 8) * 4 + n * (k // group_size) * (2 if symmetric else 3) + (4 * k if act_order else 0)


def int4_linear(x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N], for few rows."""
    from twinweight.kernels import decode

    x = x if w.perm is None else x.index_select(1, w.perm)
    return decode.int4_linear(x, w.packed, w.scales, w.zeros, bias, group_size=w.group_size)


def fused_linear(x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N], int4 unpacked inside the GEMM."""
    from twinweight.kernels import fused

    x = x if w.perm is None else x.index_select(1, w.perm)
    return fused.fused_linear(x, w.packed, w.scales, w.zeros, bias, group_size=w.group_size)


def expand(w: KernelWeight, out: Tensor) -> None:
    """Write the dense weight into out [N, K], tile by tile, rounding once."""
    from twinweight.kernels import expand as kernel

    kernel.expand(w.packed, w.scales, w.zeros, w.perm, out, group_size=w.group_size)


def paths_without_twin() -> tuple[int, ...]:
    """Both: the crossover between them is measured."""
    return (int(Path.INT4), int(Path.FUSED))


def twin_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The activation dtype: matrix units take nothing wider at that speed."""
    return (dtype,)


def empty_twin(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, K], with rows padded off the cache cliff where the GPU has one."""
    return empty_padded(n, k, dtype, device)


def twin_bytes(n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of `empty_twin`."""
    return n * padded_stride(k, dtype.itemsize, cliff_bytes=cliff(device)) * dtype.itemsize


def _permuted(packed: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of packed words, some rows at a time."""
    out = torch.empty_like(packed)
    step = max(1, TILE_BYTES // (packed.shape[1] * 8 * 8))
    for at in range(0, packed.shape[0], step):
        values = unpack_nibbles(packed[at : at + step])[:, : len(order)]
        out[at : at + step] = pack_nibbles(values.index_select(1, order))
    return out
