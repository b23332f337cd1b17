"""`int4`: x @ W.T + b for few rows, where the time is that of reading the 4-bit weight once.

One row: `_gemv_kernel`, reductions in fp32. More rows: the matrix instructions of `fused.py` with small tiles and K split
over programs, because a second row through the GEMV kernel would unpack the weight a second time.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device, traits_of
from .fused import fused_linear, whole_words
from .parts import sum_parts
from .tiles import DotTiles, GemvTiles, decode_tiles
from .unpack import check_linear, check_weight, group_constants, group_words, round_to, weight_column


@triton.jit
def _gemv_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """BLOCK_N outputs of one row of x (program axis 2), over one part of K (axis 1; fp32 without bias where SPLIT_K > 1)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    weight_ptrs = packed_ptr + rows_n[:, None] * W + offs_w[None, :]
    # x comes four columns a load: a thread holds whole words, and two bytes at a time would cost more loads than the weight.
    x_ptrs = (x_ptr + row * stride_x).to(tl.pointer_type(tl.int64)) + offs_w * 2
    steps = tl.cdiv(tl.cdiv(W, BLOCK_W), SPLIT_K)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(W, BLOCK_W))

    if GROUP_WORDS == 0:
        s, c = group_constants(scales_ptr, zeros_ptr, rows_n, offs_w, 0, G, GROUP_WORDS, BLOCK_W, HAS_ZEROS)
    acc = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * BLOCK_W
        inside = at + offs_w < W
        if EVEN_W:
            words = tl.load(weight_ptrs + at)
        else:
            words = tl.load(weight_ptrs + at, mask=inside[None, :], other=0)
        if GROUP_WORDS != 0:
            s, c = group_constants(scales_ptr, zeros_ptr, rows_n, at + offs_w, at, G, GROUP_WORDS, BLOCK_W, HAS_ZEROS)
        for half in tl.static_range(2):
            if EVEN_W:
                x4 = tl.load(x_ptrs + at * 2 + half)
            else:
                x4 = tl.load(x_ptrs + at * 2 + half, mask=inside, other=0)
            for j in tl.static_range(4):
                x = ((x4 >> (16 * j)) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                w = round_to(weight_column(words, s, c, half * 4 + j), dtype, NATIVE, True).to(tl.float32)
                acc += w * x[None, :]

    total = tl.sum(acc, axis=1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows_n).to(tl.float32)
    out_ptr += tl.program_id(1).to(tl.int64) * stride_split + row * stride_out
    result = round_to(total, out_ptr.dtype.element_ty, NATIVE, False)
    tl.store(out_ptr + offs_n, result, mask=offs_n < N)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    out: Tensor | None = None,
    tiles: GemvTiles | DotTiles | None = None,
) -> Tensor:
    """x @ W.T + b for few rows (right for any number), accumulated in fp32 and rounded once.

    Shapes, exactness and errors are those of `fused_linear`. tiles: None for `decode_tiles`; its type picks the kernel.
    """
    n, words, groups = check_weight(packed, scales, zeros, group_size=group_size, k=x.shape[-1])
    out = check_linear(x, bias, out, n=n, device=packed.device)
    m, k = x.shape
    if m == 0 or n == 0:
        return out
    traits = traits_of(x.device)
    t = tiles or decode_tiles(m, n, k, group_size, traits)
    if isinstance(t, DotTiles):
        return fused_linear(x, packed, scales, zeros, bias, group_size=group_size, out=out, tiles=t)
    with on_device(x):
        source = _aligned(whole_words(x))
        split = t.split_k > 1
        target = torch.empty((t.split_k, m, n), dtype=torch.float32, device=x.device) if split else out
        _gemv_kernel[(-(-n // t.block_n), t.split_k, m)](
            source, packed, scales, zeros, None if split else bias, target,
            n, words, groups, source.stride(0), n if split else out.stride(0), m * n if split else 0,
            GROUP_WORDS=group_words(group_size, groups), HAS_ZEROS=zeros is not None, HAS_BIAS=bias is not None and not split,
            EVEN_W=words % t.block_words == 0, BLOCK_N=t.block_n, BLOCK_W=t.block_words, SPLIT_K=t.split_k,
            STAGES=t.num_stages, NATIVE=traits.rounds_bf16, num_warps=t.num_warps,
        )  # fmt: skip
        if split:
            sum_parts(target, bias, out)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x, copied where a row does not start on the 8 bytes that the GEMV kernel loads at once."""
    aligned = x.stride(0) % 4 == 0 and x.data_ptr() % 8 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
