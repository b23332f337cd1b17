"""`fused` and `int4`: x @ W.T + b on matrix instructions, the 4-bit weight unpacked in the inner loop.

The weight is the left operand: matrix units take that one from registers, where it was just made, and few rows of x need a
narrow instruction only. With few outputs K is split over programs; the last to finish a tile adds the parts in a fixed
order, so there is one launch, and the same sum on every run.

Few rows are bound by unpacking. There (`DotTiles.scale_sums`) matrix units take integers, and scales act on the sums of a
group, in fp32: half an instruction a weight less. Where 16-bit arithmetic has no packed form for the dtype the integers stay
biased, as a shift and a mask leave them, and a second product, of which few rows have plenty, subtracts bias and zero
points. (On Hopper that form costs more than it saves: operands that do not change are moved into place for every product.)
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import traits_of
from .forms import AmpereTiles, DeviceTraits, DotTiles, FewTiles, HopperFewTiles, HopperTiles
from .launch import COUNTERS, Launch, Plan, counters, plan
from .tiles import fused_tiles, plain_tiles
from .unpack import (
    biased_zeros,
    check_linear,
    check_step,
    check_turns,
    check_weight,
    group_at,
    group_columns,
    integer_tile,
    load_group,
    packing,
    pair_constants,
    round_to,
    row_offset,
    tile_at,
    weight_tile,
    word_offset,
)

Tiles = DotTiles | AmpereTiles | HopperTiles | HopperFewTiles
Weight = tuple[Tensor, Tensor, Tensor | None]
"""packed, scales, zeros."""
Choose = Callable[[int, int, int, int, DeviceTraits, bool], Tiles]


@triton.jit
def _finish(acc, bias_ptr, out_ptr, rows_n, rows_m, stride_out, inside, HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """Add the bias, round once, store."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_n).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows_m.to(tl.int64)[None, :] * stride_out + rows_n[:, None]
    tl.store(out_ptrs, round_to(acc, out_ptr.dtype.element_ty, NATIVE, False), mask=inside)


@triton.jit(do_not_specialize=["M", "G"])  # one compilation for all numbers of rows, and of groups
def _dot_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    counters_ptr,
    M,
    N,
    K,
    W,
    G,
    stride_x,
    stride_out,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    SETTLE: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One tile of out = x @ W.T + b, over one of SPLIT_K parts of K (program axis 1)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BLOCK_K: tl.constexpr = 8 * BLOCK_W
    # A step of K lies in one group, or is one block whose halves may have one each.
    HALVES: tl.constexpr = GROUP % BLOCK_K != 0
    pid = tl.program_id(0)
    pid_m, pid_n = tile_at(pid, M, N, BLOCK_M, BLOCK_N, GROUP_N)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Output features past the end repeat the last one and are never stored: no masks on the weight in the loop. Rows of x
    # past the end are not read at all: they would cost few rows most of their traffic.
    rows_n = tl.minimum(offs_n, N - 1)
    inside_m = (offs_m < M)[:, None]
    offs_w = tl.arange(0, BLOCK_W)
    offs_k = tl.arange(0, BLOCK_K)
    # 64-bit arithmetic on the tile's corner only: within a tile 32 bits do, at half the registers.
    packed_ptr += (pid_n * BLOCK_N).to(tl.int64) * W
    x_ptr += (pid_m * BLOCK_M).to(tl.int64) * stride_x
    weight_offs = row_offset(rows_n - pid_n * BLOCK_N, W)[:, None] + word_offset(offs_w)[None, :]
    x_offs = tl.arange(0, BLOCK_M)[:, None] * stride_x + offs_k[None, :]
    total = tl.cdiv(W, BLOCK_W)
    steps = tl.cdiv(total, SPLIT_K)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, total)

    if GROUP == 0:
        s0, z0 = load_group(scales_ptr, zeros_ptr, 0, rows_n, G, HAS_ZEROS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(first, last):
        if GROUP != 0:
            s0, z0 = load_group(scales_ptr, zeros_ptr, group_at(step, G, GROUP, BLOCK_K, 0), rows_n, G, HAS_ZEROS)
        a0, b0 = pair_constants(s0, z0, dtype, PACKED, HAS_ZEROS)
        a1, b1 = a0, b0
        if HALVES:
            s1, z1 = load_group(scales_ptr, zeros_ptr, group_at(step, G, GROUP, BLOCK_K, 1), rows_n, G, HAS_ZEROS)
            a1, b1 = pair_constants(s1, z1, dtype, PACKED, HAS_ZEROS)
        word_ptrs, x_ptrs = packed_ptr + step * (16 * BLOCK_W) + weight_offs, x_ptr + step * BLOCK_K + x_offs
        if EVEN_W:
            words = tl.load(word_ptrs)
        else:
            words = tl.load(word_ptrs, mask=(step * BLOCK_W + offs_w)[None, :] < W, other=0)
        if EVEN_K:
            x = tl.load(x_ptrs, mask=inside_m, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=inside_m & (step * BLOCK_K + offs_k < K)[None, :], other=0.0)
        if SCALE_SUMS:
            if PACKED == 2:
                sums = tl.dot(integer_tile(words, b0, dtype, HAS_ZEROS, True), tl.trans(x))
            else:
                sums = tl.dot(biased_zeros(z0, BLOCK_K, dtype, HAS_ZEROS), tl.trans(x))
                sums = tl.dot(integer_tile(words, b0, dtype, HAS_ZEROS, False), tl.trans(x), sums)
            acc += sums * s0.to(tl.float32)[:, None]
        else:
            w = weight_tile(words, a0, b0, a1, b1, dtype, HAS_ZEROS, PACKED, NATIVE)
            acc = tl.dot(w, tl.trans(x), acc)
        if SETTLE:
            # Products on Hopper go on beside what follows, and read the weight from registers meanwhile, into which the next
            # turn writes (seen in machine code of Triton 3.6, and on an H100 sums of garbage at 128 x 128 with 8 warps, for
            # which triton-lang/triton#11047 has another cause). A use of the sums waits, and the copies' barrier follows.
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)

    inside = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    if SPLIT_K == 1:
        _finish(acc, bias_ptr, out_ptr, rows_n, offs_m, stride_out, inside, HAS_BIAS, NATIVE)
    else:
        local = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = parts_ptr + pid.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + local
        tl.store(mine + tl.program_id(1) * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()  # every thread's part is written before the one that counts it
        arrived = tl.atomic_add(counters_ptr + pid, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            tl.store(counters_ptr + pid, 0)  # ready for the next launch
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            for part in tl.static_range(SPLIT_K):
                acc += tl.load(mine + part * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            _finish(acc, bias_ptr, out_ptr, rows_n, offs_m, stride_out, inside, HAS_BIAS, NATIVE)


def fused_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x @ W.T + b on matrix instructions, accumulated in fp32 and rounded once; for tens to hundreds of rows.

    x: bf16 or fp16 [M, K], any M >= 0, any row stride. packed: int32 in the order of `order.py`;
    scales: bf16 or fp16 [N, groups]; zeros: int16 [N, groups] or None; all contiguous, as `gpu.prepare` makes them, with
    columns in group order; group_size: K, or a multiple of 32 that divides it. bias: [N] or None. out: [M, N] of x's dtype,
    any row stride, or None for a new one. tiles: None for `fused_tiles`. Returns out.

    The weight that enters the product is `Int4Weight.dequantize(x.dtype)`, exactly; with `scale_sums` it is not even rounded,
    and the identity as x gives the same.
    Raises ValueError that names the tensor whose shape, dtype, device or strides do not fit.
    """
    return launch(x, packed, scales, zeros, bias, group_size, out, tiles, fused_tiles)


def launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out: Tensor | None,
    tiles: Tiles | None,
    choose: Choose,
) -> Tensor:
    """`fused_linear` with the tile choice of another path."""
    weight = packed, scales, zeros
    return started(planned(x, weight, bias, group_size, out, tiles, choose), x, weight, bias, out)


def started(found: Plan, x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Launch what was `planned` for such a call; looks at nothing. Returns out."""
    if out is None:
        out = x.new_empty(found.out_shape)
    if found.launch is not None:
        parts = x.new_empty(found.parts, dtype=torch.float32) if found.parts else None
        locks = counters(x.device) if found.parts else None
        found.launch(x, *weight, bias, out, parts, locks)
    return out


def planned(
    x: Tensor, weight: Weight, bias: Tensor | None, group_size: int, out: Tensor | None, tiles: Tiles | None, choose: Choose
) -> Plan:
    """What follows from the shapes and dtypes of a `launch` alone, worked out once. Checks tensors, as `fused_linear` says."""
    packed, scales, zeros = weight
    key = (
        choose, x.shape, x.stride(), x.dtype, x.get_device(), packed.shape, scales.shape, scales.dtype, zeros is None,
        bias is None or (bias.shape, bias.dtype), out is None or (out.shape, out.stride(), out.dtype), group_size, tiles,
        x.data_ptr() % 16,
    )  # fmt: skip
    return plan(key, lambda: _plan(x, packed, scales, zeros, bias, group_size, out, tiles, choose))


def kernel_flags(t: DotTiles, group: int, packed_as: int, traits: DeviceTraits) -> tuple[bool, bool]:
    """The kernel's SCALE_SUMS and SETTLE, for its GROUP and PACKED.

    Sums are scaled where a step lies in one group, but not where arithmetic is packed without PTX (fp16 on AMD): there a
    second product costs what scaling weights does.
    """
    scale_sums = t.scale_sums and group % (8 * t.block_words) == 0 and packed_as != 1
    return scale_sums, traits.wgmma and not scale_sums


def _plan(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out: Tensor | None,
    tiles: Tiles | None,
    choose: Choose,
) -> Plan:
    n, words, groups = check_weight(packed, scales, zeros, group_size=group_size, k=x.shape[-1])
    check_linear(x, bias, out, n=n, device=packed.device)
    m, k = x.shape
    if m == 0 or n == 0:
        return Plan((m, n), None)
    traits = traits_of(x.device)
    zero_points, packed_as = zeros is not None, packing(x.dtype, scales.dtype, traits)
    t = tiles or choose(m, n, k, group_size, traits, zero_points)
    if reason := _unfit(t, x, packed_as):
        if tiles is not None:
            raise ValueError(reason)
        t = plain_tiles(m, n, k, group_size, traits, zero_points)
    whole = 0 if isinstance(t, DotTiles) else t.whole
    tiles_m, tiles_n = -(-m // t.rows), -(-n // t.block_n)
    few = isinstance(t, FewTiles)  # whose grid has an axis for rows
    split = tiles_m * (tiles_n - whole) if few else tiles_m * tiles_n - whole
    if split < 0 or (t.split_k > 1 and split > COUNTERS):
        raise ValueError(f"tiles: expected up to {COUNTERS} of split K, found {split} beside {whole}, in {t.split_k} parts")
    parts = split * t.split_k if t.split_k > 1 else 0
    group = group_columns(group_size, groups)
    stride_out = out.stride(0) if out is not None else n
    integers: tuple[int, ...] = (m, n, k, words, groups, x.stride(0), stride_out)
    flags = (group, zero_points, bias is not None)
    kernel: Any = _dot_kernel
    grid = (split, t.split_k, 1)
    options = {"num_warps": t.num_warps}
    if isinstance(t, DotTiles):
        check_step(t.block_words, group)
        options["num_stages"] = t.num_stages
        even = k % (8 * t.block_words) == 0, words % t.block_words == 0
        scale_sums, settle = kernel_flags(t, group, packed_as, traits)
        constants: tuple[object, ...] = (
            *flags, *even, t.block_m, t.block_n, t.block_words, t.split_k, t.group_n, scale_sums, settle, packed_as,
            traits.rounds_bf16,
        )  # fmt: skip
    else:
        options |= {"maxnreg": t.registers} if t.registers else {}
        integers = (*integers, whole, t.split_k)
        if isinstance(t, HopperTiles):
            from .hopper import hopper_dot_kernel as kernel

            grid = (whole + split * t.split_k, 1, 1)
            constants = (*flags, t.block_m, t.more_m, t.block_n, parts > 0, t.group_n, packed_as)
        else:
            pairs = check_turns(t.block_words, t.depth, t.split_k, k, group)
            grid = (whole + (tiles_n - whole) * t.split_k, tiles_m, 1)
            integers = (*integers, tiles_n - whole, pairs // t.split_k)
            if isinstance(t, HopperFewTiles):
                if t.block_words != 8:
                    raise ValueError(f"tiles: expected steps of 8 words, found {t}")
                from .hopper_few import hopper_few_dot_kernel as kernel

                constants = (*flags, t.block_m, t.block_n, t.depth, parts > 0)
            else:
                from .ampere import ampere_dot_kernel as kernel

                constants = (*flags, t.block_m, t.block_n, t.block_words, t.depth, parts > 0)
    launch = Launch(kernel, grid, integers, constants, options, x.device)
    return Plan((m, n), launch, parts * t.rows * t.block_n)


def _unfit(t: Tiles, x: Tensor, packed_as: int) -> str:
    """Why the kernel of these tiles does not take this x, if so: Gluon's kernels copy 16 bytes of x at once."""
    if isinstance(t, DotTiles):
        return ""
    if x.shape[1] % 64 or x.stride(0) % 16 or x.data_ptr() % 16:
        return f"x: expected K a multiple of 64 and aligned rows, found {list(x.shape)}, {x.stride()}"
    if not isinstance(t, HopperTiles) and packed_as != 2:
        return f"x: expected the dtype of the scales, found {x.dtype}"
    return ""
