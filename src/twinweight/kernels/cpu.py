"""The CPU paths: ATen's int4 kernel on its own packed layout, and the expansion of that layout into a dense weight.

ATen's kernel computes `(q - 8) * scale + zero` in fp32 with both parameters in the activation dtype. A symmetric weight is
therefore exact. An asymmetric one is exact where `zero` fits 16 bits: `(8 - zero_point) * scale` does for zero points
0, 4, 6..10 and 12. A group with zero point 3, 5, 11 or 15 is stored mirrored, 15 - q with a negated scale, which
makes its zero `(7 - zero_point) * scale` and exact too. Zero points 1, 2, 13 and 14 (groups that barely cross zero) may be
rounded, by at most 7/256 of a quantization step. The twin is expanded from the packed layout, so it holds what the kernel
computes in every case.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from twinweight.errors import TwinweightError
from twinweight.kernels.pages import in_huge_pages
from twinweight.kernels.prepared import TILE_BYTES, Again, KernelWeight, group_order
from twinweight.paths import Path
from twinweight.weight import SYMMETRIC_ZERO, Int4Weight, pack_nibbles, unpack_nibbles

_ROWS = 64  # rows are padded to ATen's widest block, so that every block is whole
_GROUPS = (256, 128, 64, 32)  # group sizes the kernel takes
_EXPANDED = 2 << 20  # weights expanded at a time: they stay in the caches from one pass to the next
_MIRRORED = (3, 5, 11, 15)  # zero points whose groups are stored as 15 - q


def begin(device: torch.device) -> None:
    """Nothing: ATen is there."""


def prepare(weight: Int4Weight) -> KernelWeight:
    """Repack for ATen: packed uint8 [N', K' / 2], scales [K' / g, N', 2] holding (scale, zero).

    N' is N rounded up to 64, K' is K rounded up to 32 (per-channel weights only; the added columns meet zero activations).
    """
    n, k = weight.shape
    rows, cols = -(-n // _ROWS) * _ROWS, -(-k // 32) * 32
    group = weight.group_size if weight.group_size < k else cols
    kernel_group = _kernel_group(group)
    perm = group_order(weight)
    mirrored = torch.isin(weight.zeros, torch.tensor(_MIRRORED)) if weight.zeros is not None else None
    packed = in_huge_pages(torch.empty(rows, cols // 2, dtype=torch.uint8))
    step = max(_ROWS, TILE_BYTES // 8 // cols // _ROWS * _ROWS)
    for at in range(0, rows, step):
        stop = min(at + step, rows)
        values = unpack_nibbles(weight.packed[at : min(stop, n)])[:, :k]
        if perm is not None:
            values = values.index_select(1, perm)
        if mirrored is not None:
            values = values ^ (mirrored[at : min(stop, n)].to(torch.uint8) * 15).repeat_interleave(weight.group_size, dim=1)
        tile = torch.full((stop - at, cols), SYMMETRIC_ZERO, dtype=torch.int32)
        tile[: values.shape[0], :k] = values
        packed[at:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(tile, 1)
    scale = weight.scales.float()
    zero = torch.zeros_like(scale)
    if weight.zeros is not None and mirrored is not None:
        zero = (SYMMETRIC_ZERO - mirrored.float() - weight.zeros.float()) * scale
        scale = torch.where(mirrored, -scale, scale)
    both = torch.stack((scale, zero), dim=-1).repeat_interleave(group // kernel_group, dim=1)
    scales = torch.zeros(cols // kernel_group, rows, 2, dtype=weight.scales.dtype)
    scales[:, :n] = both.transpose(0, 1)
    return KernelWeight(packed, scales, None, perm, kernel_group, n, k)


def int4_linear(x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] in the dtype of the scales -> [M, N]. Fast for bf16; ATen has only a reference loop for fp16."""
    if w.perm is not None:
        x = x.index_select(1, w.perm)
    cols = w.packed.shape[1] * 2
    if cols != w.k:
        x = torch.nn.functional.pad(x, (0, cols - w.k))
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), w.packed, w.group_size, w.scales)
    if bias is not None:
        return y[:, : w.n] + bias
    return y if y.shape[1] == w.n else y[:, : w.n].contiguous()


def again(path: int, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Again | None:
    """`int4_linear` for other contiguous x [..., K] of exactly these sizes. None for other paths."""
    if path not in (Path.INT4, Path.FUSED):
        return None
    if x.dim() == 2:
        return int4_linear
    rows, shape = (-1, x.shape[-1]), (*x.shape[:-1], w.n)
    return lambda x, w, bias: int4_linear(x.view(rows), w, bias).view(shape)


def expand(w: KernelWeight, out: Tensor) -> None:
    """Write the dense weight into out [N, K] (fp32, bf16 or fp16; rows may be strided), rounding once."""
    expand_rows(w, 0, w.n, out)


def expand_rows(w: KernelWeight, first: int, last: int, out: Tensor) -> None:
    """As `expand`, for output features first to last (first a multiple of 64), into out [last - first, K]."""
    if first % _ROWS:
        raise ValueError(f"first is {first}, expected a multiple of {_ROWS}")
    size = _block()[0]
    cols = w.packed.shape[1] * 2
    blocks = w.packed.view(-1, cols, size // 2)[first // size : -(-last // size)]
    order = w.perm.long() if w.perm is not None else slice(w.k)
    as_they_lie = w.perm is None and cols == w.k
    scales, zeros = w.scales[:, first:last].permute(2, 1, 0).unsqueeze(-1).contiguous()  # [last - first, groups, 1] each
    shifted = bool(zeros.any())
    if shifted or out.dtype != scales.dtype:
        scales, zeros = scales.float(), zeros.float()
    step = max(1, _EXPANDED // (cols * size))
    for at in range(0, blocks.shape[0], step):
        part = slice(at * size, min((at + step) * size, last - first))
        values = _values(blocks[at : at + step])[: part.stop - part.start].view(torch.int8).sub_(SYMMETRIC_ZERO)
        rows = out[part] if as_they_lie else torch.empty(values.shape, dtype=out.dtype)
        values, dense = (t.view(len(t), -1, w.group_size) for t in (values, rows))
        scale = scales[part]
        # (q - 8) * s + z has at most 13 significant bits at every step: fp32 holds it exactly, and a product rounds once.
        if shifted:
            dense.copy_(values.float().mul_(scale).add_(zeros[part]))
        else:
            torch.mul(values.to(scale.dtype), scale, out=dense)
        if not as_they_lie:
            out[part, order] = rows[:, : w.k]


def _values(blocks: Tensor) -> Tensor:
    """Blocks [B, K', rows / 2] of ATen's layout -> uint8 [B * rows, K']. In few passes over bytes: that is most of the time of
    an expansion.
    """
    size, low, high = _block()
    pairs = blocks.transpose(1, 2).contiguous()
    values = torch.empty(len(pairs), size, pairs.shape[2], dtype=torch.uint8)
    values[:, low], values[:, high] = pairs & 15, pairs >> 4
    return values.flatten(0, 1)


def unprepare(w: KernelWeight, *, symmetric: bool, group_size: int) -> Int4Weight:
    """The `Int4Weight` that `prepare` took, for saving and for moving to another device.

    Zero points come back exactly: the rounding of `zero` is smaller than half a step.
    """
    values = _values(w.packed.view(-1, w.packed.shape[1] * 2, _block()[0] // 2))[: w.n, : w.k]
    repeat = w.scales.shape[0] * group_size // w.k if group_size < w.k else w.scales.shape[0]
    scale, zero = w.scales[::repeat, : w.n].permute(2, 1, 0).contiguous()
    zeros = None
    if not symmetric:
        mirrored = scale < 0
        steps = (zero.float() / torch.where(scale == 0, 1, scale.float())).round()
        zeros = torch.where(mirrored, SYMMETRIC_ZERO - 1 + steps, SYMMETRIC_ZERO - steps).to(torch.uint8)
        values ^= (mirrored.to(torch.uint8) * 15).repeat_interleave(group_size, dim=1)
        scale = scale.abs()
    g_idx = None
    if w.perm is not None:
        order = w.perm.long()
        values = torch.empty_like(values).index_copy_(1, order, values)
        g_idx = torch.empty(w.k, dtype=torch.int32).index_copy_(0, order, torch.arange(w.k, dtype=torch.int32) // group_size)
    return Int4Weight(pack_nibbles(values), scale, zeros, g_idx, group_size, w.k)


@lru_cache(maxsize=1)
def _block() -> tuple[int, Tensor | slice, Tensor | slice]:
    """Rows of a block of ATen's layout, and which of them the low and the high nibbles of a column's bytes are.

    The layout depends on the instruction set that ATen runs with (blocks of 64 rows with AVX-512, of 32 without), so it is
    read off packed probes: every row of a block is found once, or the block has another size.
    """
    cols, rows = 32, torch.arange(_ROWS)
    packed = []
    for probe in (rows % 16, rows // 16):
        tile = torch.zeros(_ROWS, cols, dtype=torch.int32)
        tile[:, 1] = probe
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(tile, 1).flatten())
    for size in (64, 32, 16):
        first, second = (p.view(_ROWS // size, cols, size // 2)[0, 1].long() for p in packed)
        low, high = (first & 15) + 16 * (second & 15), (first >> 4) + 16 * (second >> 4)
        if torch.equal(torch.cat((low, high)).sort().values, torch.arange(size)):
            return size, _as_slice(low), _as_slice(high)
    raise TwinweightError("this build of torch packs int4 weights in a layout that Twinweight does not know")


def _as_slice(rows: Tensor) -> Tensor | slice:
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if torch.equal(rows, torch.arange(first, last)) else rows


fused_linear = int4_linear  # ATen's kernel unpacks inside the GEMM for any number of rows


def paths_without_twin() -> tuple[int, ...]:
    """On the CPU `int4` and `fused` are the same kernel."""
    return (int(Path.INT4), int(Path.STREAM))


def twin_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """fp32 beside the activation dtype: without AMX or AVX512_BF16 its GEMM is the faster one."""
    return (dtype, torch.float32)


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products in hardware; elsewhere they are slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dense rows that are expanded for one product: the fastest GEMM's."""
    return torch.bfloat16 if dtype == torch.bfloat16 and _multiplies_bf16() else torch.float32


def empty_twin(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, K], contiguous: CPUs need no padding."""
    return in_huge_pages(torch.empty(n, k, dtype=dtype, device=device))


def twin_bytes(n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of `empty_twin`."""
    return n * k * dtype.itemsize


def weight_bytes(n: int, k: int, group_size: int, act_order: bool, symmetric: bool) -> int:
    """Bytes of what `prepare` returns, without preparing."""
    rows, cols = -(-n // _ROWS) * _ROWS, -(-k // 32) * 32
    group = _kernel_group(group_size if group_size < k else cols)
    return rows * cols // 2 + cols // group * rows * 4 + (4 * k if act_order else 0)


def _kernel_group(group: int) -> int:
    return next(g for g in _GROUPS if group % g == 0)
