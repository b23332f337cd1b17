"""`expand`: the dense twin from the 4-bit weight, written tile by tile straight into its final buffer."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import traits_of
from .forms import ExpandTiles
from .launch import Launch, Plan, plan
from .tiles import expand_tiles
from .unpack import (
    FLOAT_TYPES,
    check_step,
    check_weight,
    group_at,
    group_columns,
    load_group,
    packing,
    pair_constants,
    row_offset,
    weight_tile,
    word_offset,
)


@triton.jit(do_not_specialize=["G"])
def _expand_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    perm_ptr,
    out_ptr,
    first_row,
    rows,
    K,
    W,
    G,
    stride_out,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_PERM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_N rows by BLOCK_W words; K runs fastest over programs, so that neighbours write neighbouring cache lines."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    BLOCK_K: tl.constexpr = 8 * BLOCK_W
    HALVES: tl.constexpr = GROUP % BLOCK_K != 0
    tiles_w = tl.cdiv(W, BLOCK_W)
    step = tl.program_id(0) % tiles_w
    offs_n = tl.program_id(0) // tiles_w * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_n = first_row + tl.minimum(offs_n, rows - 1)
    offs_w = step * BLOCK_W + tl.arange(0, BLOCK_W)
    weight_ptrs = packed_ptr + row_offset(rows_n.to(tl.int64), W)[:, None] + word_offset(offs_w)[None, :]
    if EVEN:
        words = tl.load(weight_ptrs)
    else:
        words = tl.load(weight_ptrs, mask=(offs_w < W)[None, :], other=0)
    s0, z0 = load_group(scales_ptr, zeros_ptr, group_at(step, G, GROUP, BLOCK_K, 0), rows_n, G, HAS_ZEROS)
    a0, b0 = pair_constants(s0, z0, dtype, PACKED, HAS_ZEROS)
    a1, b1 = a0, b0
    if HALVES:
        s1, z1 = load_group(scales_ptr, zeros_ptr, group_at(step, G, GROUP, BLOCK_K, 1), rows_n, G, HAS_ZEROS)
        a1, b1 = pair_constants(s1, z1, dtype, PACKED, HAS_ZEROS)
    w = weight_tile(words, a0, b0, a1, b1, dtype, HAS_ZEROS, PACKED, NATIVE)
    columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (offs_n < rows)[:, None]
    if not EVEN:
        inside = inside & (columns < K)[None, :]
    if HAS_PERM:
        columns = tl.load(perm_ptr + columns, mask=columns < K, other=0)
    tl.store(out_ptr + offs_n[:, None].to(tl.int64) * stride_out + columns[None, :], w, mask=inside)


def expand(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out: Tensor,
    *,
    group_size: int,
    rows: tuple[int, int] | None = None,
    tiles: ExpandTiles | None = None,
) -> Tensor:
    """The dense weight, rounded once, into `out`; equal bit for bit to `Int4Weight.dequantize(out.dtype)`. No temporary.

    packed, scales, zeros, group_size: as in `fused_linear`. perm: int32 or int64 [K] where columns are stored sorted by
    group (act-order): stored column j goes to column perm[j]; or None. rows: (start, stop), to expand only these output
    features. out: bf16 or fp16 [N or stop - start, K], any row stride >= K; what lies between its rows is not touched.
    Returns out. Raises ValueError that names the tensor whose shape, dtype, device or strides do not fit.
    """
    if out.ndim != 2 or out.dtype not in FLOAT_TYPES or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out: expected bf16 or fp16 [N, K] with contiguous rows, found {out.dtype} {list(out.shape)}, {out.stride()}"
        )
    k = out.shape[1]
    n, words, groups = check_weight(packed, scales, zeros, group_size=group_size, k=k)
    start, stop = rows if rows is not None else (0, n)
    if not 0 <= start <= stop <= n:
        raise ValueError(f"rows: expected 0 <= start <= stop <= {n}, found {rows}")
    if out.shape[0] != stop - start or (out.shape[0] > 1 and out.stride(0) < k):
        raise ValueError(f"out: expected [{stop - start}, {k}], row stride >= {k}, found {list(out.shape)}, {out.stride()}")
    if perm is not None and (perm.shape != (k,) or perm.dtype.is_floating_point or not perm.is_contiguous()):
        raise ValueError(f"perm: expected contiguous int32 or int64 [{k}], found {perm.dtype} {list(perm.shape)}")
    for name, tensor in (("out", out), ("perm", perm)):
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"{name}: expected device {packed.device}, found {tensor.device}")
    if stop == start:
        return out
    key = (
        expand, packed.shape, scales.dtype, zeros is None, perm is None or perm.dtype, out.shape, out.stride(), out.dtype,
        out.get_device(), group_size, start, tiles,
    )  # fmt: skip
    found = plan(key, lambda: _plan(scales, zeros, perm, out, (words, groups), start, group_size, tiles))
    if found.launch is not None:
        found.launch(packed, scales, zeros, perm, out)
    return out


def _plan(
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out: Tensor,
    sizes: tuple[int, int],
    start: int,
    group_size: int,
    tiles: ExpandTiles | None,
) -> Plan:
    words, groups = sizes
    rows, k = out.shape
    traits = traits_of(out.device)
    t = tiles or expand_tiles(rows, k, group_size, traits)
    columns, group = 8 * t.block_words, group_columns(group_size, groups)
    check_step(t.block_words, group)
    constants = (
        group, zeros is not None, perm is not None, k % columns == 0, t.block_n, t.block_words,
        packing(out.dtype, scales.dtype, traits), traits.rounds_bf16,
    )  # fmt: skip
    grid = (-(-rows // t.block_n) * -(-words // t.block_words), 1, 1)
    integers = (start, rows, k, words, groups, out.stride(0))
    return Plan((rows, k), Launch(_expand_kernel, grid, integers, constants, {"num_warps": t.num_warps}, out.device))
