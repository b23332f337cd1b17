"""`fused`: x @ W.T + b on matrix instructions, the 4-bit weight unpacked in the inner loop.

The order in which a dot product runs over K is free as long as both sides agree. A tile of packed words is unpacked eight
times, column j of every word at once, so nibbles never move between registers or lanes; x is cut to match: its columns
8i + j for all words i. For many rows a pass of its own reorders x first (`_sort_kernel`), for few the kernel does it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device, traits_of
from .parts import sum_parts
from .tiles import DotTiles, fused_tiles
from .unpack import check_linear, check_weight, group_constants, group_words, round_to, weight_column


@triton.jit
def _columns(x, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """x [BLOCK_M, 8 * BLOCK_W] -> eight [BLOCK_M, BLOCK_W], columns 8i + j for j = 0..7: no data leaves its thread."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_W, 2, 2, 2]))
    c04_26, c15_37 = tl.split(even), tl.split(odd)
    c04, c26, c15, c37 = tl.split(c04_26[0]), tl.split(c04_26[1]), tl.split(c15_37[0]), tl.split(c15_37[1])
    return c04[0], c15[0], c26[0], c37[0], c04[1], c15[1], c26[1], c37[1]


@triton.jit
def _sort_kernel(x_ptr, sorted_ptr, M, K, stride_x, stride_sorted, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """x [M, K] -> [M, K tiles, 8, BLOCK_W], zeros past K: the order in which `_dot_kernel` reads it."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_W * 8 + tl.arange(0, BLOCK_W * 8))[None, :]
    x = tl.load(x_ptr + rows * stride_x + columns, mask=(rows < M) & (columns < K), other=0.0)
    x = tl.reshape(tl.permute(tl.reshape(x, [BLOCK_M, BLOCK_W, 8]), [0, 2, 1]), [BLOCK_M, BLOCK_W * 8])
    tl.store(sorted_ptr + rows * stride_sorted + columns, x, mask=rows < M)


@triton.jit
def _dot_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    W,
    G,
    stride_x,
    stride_out,
    stride_split,
    GROUP_WORDS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_W: tl.constexpr,
    SORTED_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One tile of out = x @ W.T + b, or of one part of K (fp32, without bias) where SPLIT_K > 1."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_n = pid // (GROUP_N * tiles_m) * GROUP_N
    here_n = tl.minimum(tiles_n - first_n, GROUP_N)
    pid_n = first_n + pid % (GROUP_N * tiles_m) % here_n
    pid_m = pid % (GROUP_N * tiles_m) // here_n

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one and are never stored: no masks on them in the loop.
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    weight_ptrs = packed_ptr + rows_n[:, None] * W + offs_w[None, :]
    steps = tl.cdiv(tl.cdiv(W, BLOCK_W), SPLIT_K)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(W, BLOCK_W))

    if GROUP_WORDS == 0:
        s, c = group_constants(scales_ptr, zeros_ptr, rows_n, offs_w, 0, G, GROUP_WORDS, BLOCK_W, HAS_ZEROS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(first, last):
        at = step * BLOCK_W
        if EVEN_W:
            words = tl.load(weight_ptrs + at)
        else:
            words = tl.load(weight_ptrs + at, mask=(at + offs_w)[None, :] < W, other=0)
        if GROUP_WORDS != 0:
            s, c = group_constants(scales_ptr, zeros_ptr, rows_n, at + offs_w, at, G, GROUP_WORDS, BLOCK_W, HAS_ZEROS)
        if SORTED_X:
            sorted_ptrs = x_ptr + rows_m[:, None] * stride_x + at * 8 + offs_w[None, :]
            # The weight is the left operand: Hopper takes that one from registers, where it was just made.
            for j in tl.static_range(8):
                x = tl.load(sorted_ptrs + j * BLOCK_W)
                w = round_to(weight_column(words, s, c, j), x.dtype, NATIVE, True)
                acc = tl.dot(w, tl.trans(x), acc)
        else:
            offs_k = at * 8 + tl.arange(0, BLOCK_W * 8)
            x_ptrs = x_ptr + rows_m[:, None] * stride_x + offs_k[None, :]
            if EVEN_W:
                xs = _columns(tl.load(x_ptrs), BLOCK_M, BLOCK_W)
            else:
                xs = _columns(tl.load(x_ptrs, mask=(offs_k < W * 8)[None, :], other=0.0), BLOCK_M, BLOCK_W)
            for j in tl.static_range(8):
                w = round_to(weight_column(words, s, c, j), xs[j].dtype, NATIVE, True)
                acc = tl.dot(w, tl.trans(xs[j]), acc)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n).to(tl.float32)[:, None]
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * stride_split + rows_m[None, :] * stride_out + rows_n[:, None]
    result = round_to(acc, out_ptr.dtype.element_ty, NATIVE, False)
    tl.store(out_ptrs, result, mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def fused_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    out: Tensor | None = None,
    tiles: DotTiles | None = None,
) -> Tensor:
    """x @ W.T + b on matrix instructions, accumulated in fp32 and rounded once; for tens to hundreds of rows.

    x: bf16 or fp16 [M, K], any M >= 0, any row stride. packed, scales, zeros: contiguous, as in `Int4Weight` with columns
    in group order; group_size: K, or a multiple of 32 that divides it. bias: [N] or None. out: [M, N] of x's dtype,
    any row stride, or None for a new one. tiles: None for `fused_tiles`. Returns out.

    The weight that enters the product is exactly `Int4Weight.dequantize(x.dtype)`.
    Raises ValueError that names the tensor whose shape, dtype, device or strides do not fit.
    """
    n, words, groups = check_weight(packed, scales, zeros, group_size=group_size, k=x.shape[-1])
    out = check_linear(x, bias, out, n=n, device=packed.device)
    m, k = x.shape
    if m == 0 or n == 0:
        return out
    traits = traits_of(x.device)
    t = tiles or fused_tiles(m, n, k, group_size, traits)
    steps = -(-words // t.block_words)
    with on_device(x):
        source = _sort(x, steps, t) if t.sort_x else whole_words(x)
        split = t.split_k > 1
        target = torch.empty((t.split_k, m, n), dtype=torch.float32, device=x.device) if split else out
        grid = (-(-m // t.block_m) * -(-n // t.block_n), t.split_k)
        _dot_kernel[grid](
            source, packed, scales, zeros, None if split else bias, target,
            m, n, words, groups, source.stride(0), n if split else out.stride(0), m * n if split else 0,
            GROUP_WORDS=group_words(group_size, groups), HAS_ZEROS=zeros is not None, HAS_BIAS=bias is not None and not split,
            EVEN_W=words % t.block_words == 0, SORTED_X=t.sort_x, BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_W=t.block_words,
            SPLIT_K=t.split_k, GROUP_N=t.group_n, NATIVE=traits.rounds_bf16, num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
        if split:
            sum_parts(target, bias, out)
    return out


def _sort(x: Tensor, steps: int, t: DotTiles) -> Tensor:
    """x in the order of `_dot_kernel`, [M, steps * 8 * block_words], zeros past K."""
    m, k = x.shape
    ordered = torch.empty((m, steps * 8 * t.block_words), dtype=x.dtype, device=x.device)
    grid = (-(-m // 16), steps)
    _sort_kernel[grid](x, ordered, m, k, x.stride(0), ordered.stride(0), BLOCK_M=16, BLOCK_W=t.block_words, num_warps=4)
    return ordered


def whole_words(x: Tensor) -> Tensor:
    """x with K padded by zeros to whole words of 8 columns; itself where it has them already."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x
