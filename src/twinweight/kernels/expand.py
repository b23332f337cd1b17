"""`expand`: the dense twin from the 4-bit weight, written tile by tile straight into its final buffer."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import on_device, traits_of
from .tiles import ExpandTiles, expand_tiles
from .unpack import FLOAT_TYPES, check_weight, group_constants, group_words, round_to


@triton.jit
def _expand_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    perm_ptr,
    out_ptr,
    N,
    K,
    W,
    G,
    stride_out,
    GROUP_WORDS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_PERM: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_N rows by BLOCK_W words; K runs fastest over programs, so that a row's cache lines fill up together."""
    tiles_w = tl.cdiv(W, BLOCK_W)
    first_word = tl.program_id(0) % tiles_w * BLOCK_W
    offs_n = tl.program_id(0) // tiles_w * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    words_at = first_word + tl.arange(0, BLOCK_W)
    words = tl.load(packed_ptr + rows_n[:, None] * W + words_at[None, :], mask=(words_at < W)[None, :], other=0)
    s, c = group_constants(scales_ptr, zeros_ptr, rows_n, words_at, first_word, G, GROUP_WORDS, BLOCK_W, HAS_ZEROS)

    # A third axis holds the 8 columns of a word: they are made in the thread that writes them, as one 16-byte store.
    j = tl.arange(0, 8)[None, None, :]
    # The nibble as the top of the mantissa of 128.0, exactly as in `weight_column`.
    mantissa = (((words[:, :, None] >> (4 * j)) & 15) << 16) | 0x43000000
    w = mantissa.to(tl.float32, bitcast=True) * s[:, :, None] + c[:, :, None]
    columns = words_at[None, :, None] * 8 + j
    inside = (offs_n < N)[:, None, None]
    if WHOLE_WORDS:
        inside = inside & (words_at < W)[None, :, None]
    else:
        inside = inside & (columns < K)
    if HAS_PERM:
        columns = tl.load(perm_ptr + columns, mask=columns < K, other=0)
    out_ptrs = out_ptr + rows_n[:, None, None] * stride_out + columns
    tl.store(out_ptrs, round_to(w, out_ptr.dtype.element_ty, NATIVE, True), mask=inside)


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
    part = slice(start, stop)
    traits = traits_of(out.device)
    t = tiles or expand_tiles(stop - start, k, group_size, traits)
    with on_device(out):
        _expand_kernel[(-(-(stop - start) // t.block_n) * -(-words // t.block_words),)](
            packed[part], scales[part], zeros[part] if zeros is not None else None, perm, out,
            stop - start, k, words, groups, out.stride(0),
            GROUP_WORDS=group_words(group_size, groups), HAS_ZEROS=zeros is not None, HAS_PERM=perm is not None,
            WHOLE_WORDS=k % 8 == 0, BLOCK_N=t.block_n, BLOCK_W=t.block_words, NATIVE=traits.rounds_bf16,
            num_warps=t.num_warps,
        )  # fmt: skip
    return out
