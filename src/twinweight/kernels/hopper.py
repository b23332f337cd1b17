"""`fused` on Hopper: a step's weight is unpacked while the products of the step before run.

Triton waits for a product whose left operand comes from registers before it unpacks the next (see `fused.py`). In Gluon, its
lower level, the wait stands where it must: one step's products stay in flight while all warps unpack the next step, and end
before the step after that writes their registers. Each quarter of a step is multiplied as soon as it is unpacked.

Copies run ahead through `_STAGES` buffers, x two steps and words three, so that words are in registers a step before they are
unpacked. Each buffer is an allocation of its own and the loop is unrolled over them: so the compiler sees that a copy into one
does not meet a read of another, and one barrier a step is left.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,operator,misc"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .ampere import load_async
from .forms import MOST_PARTS
from .unpack import group_at, load_group, pair_constants, row_offset, tile_at, weight_pairs, word_offset

_STAGES = gl.constexpr(4)
"""Buffers. A copy of x goes into the one of two steps before, whose products have ended, _STAGES - 2 steps ahead; one of words
into that of the step before, which has been read, _STAGES - 1 ahead.
"""
_PARTS = gl.constexpr(MOST_PARTS)
_MANY = gl.constexpr(64)  # sums of a lane


@gluon.constexpr_function
def words_layout(rows, warps):
    """Words [rows, 8] as products want the weight that is in them: a lane holds words lane % 4 and lane % 4 + 4 of rows
    lane // 4 and lane // 4 + 8, which are two neighbouring columns, and those 8 further on, in each of four products.
    """
    repeats = [[16 * warps << i, 0] for i in range((rows // (16 * warps)).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        [[8, 0], [0, 4], *repeats], lanes, [[16 << i, 0] for i in range(warps.bit_length() - 1)], [], [rows, 8]
    )


@gluon.jit
def _copy(smem, ptrs, there):
    """Begin to copy a tile into a buffer; zeros where it is not there."""
    load_async(smem, ptrs, mask=there)


@gluon.jit
def _rows(first, rows, left, TILE_M: gl.constexpr):
    """Rows of x to read, counted from a tile's first: past the `left` that there are those of the tile before, or the first
    ones again. (Where all read the last, the same lines of memory, a tile that was half full took up to twice the time.)
    """
    other = gl.where(first > 0, rows - TILE_M, gl.minimum(rows - left, left - 1))
    return gl.where(rows < left, rows, other)


@gluon.jit
def _bias(bias_ptr, first_n, N, FEATURES: gl.constexpr, LAYOUT: gl.constexpr, HAS_BIAS: gl.constexpr):
    """The bias of some features, fp32 [FEATURES]; zeros without one."""
    bias = gl.zeros([FEATURES], gl.float32, LAYOUT)
    if HAS_BIAS:
        bias += gl.load(bias_ptr + gl.minimum(first_n + gl.arange(0, FEATURES, LAYOUT), N - 1)).to(gl.float32)
    return bias


@gluon.jit
def _store(sums, out_ptr, first_n, first_m, N, M, stride_out):
    """Round sums [features, rows] once and store them, 16 bytes a lane."""
    FEATURES: gl.constexpr = sums.shape[0]
    LANES: gl.constexpr = FEATURES // 8
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, gl.num_warps()], [0, 1])
    y = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), OUT)
    n = first_n + gl.arange(0, FEATURES, gl.SliceLayout(1, OUT))
    m = first_m + gl.arange(0, sums.shape[1], gl.SliceLayout(0, OUT))
    offsets = m.to(gl.int64)[None, :] * stride_out + n[:, None]
    gl.store(out_ptr + offsets, y, mask=(n < N)[:, None] & (m < M)[None, :])


@gluon.jit
def _in_part(FEATURES: gl.constexpr, FIRST: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where sums [FEATURES, ROWS] stand in a part, which holds FIRST rows before them: what one instruction stores of a warp's
    sums, 8 bytes a lane, lies side by side.
    """
    n = gl.arange(0, FEATURES, gl.SliceLayout(1, LAYOUT))[:, None]
    m = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
    lane = n % 8 * 8 + m % 8
    return FIRST * FEATURES + ((m // 8 * 2 + n // 8 % 2) * (FEATURES // 16) + n // 16) * 64 + lane


@gluon.jit
def _sum_parts(parts_ptr, local, sums, PART: gl.constexpr, split):
    """The sums of all parts, in a fixed order; sums: zeros. A lane that has many of them has enough loads in flight with one
    part; where it has few, all parts are loaded at once. (Large tiles that do so take five times as long to compile.)
    """
    LANES: gl.constexpr = 32 * gl.num_warps()
    if sums.shape[0] * sums.shape[1] >= _MANY * LANES:
        for i in range(0, split):
            sums += gl.load(parts_ptr + i * PART + local, cache_modifier=".cg")
    else:
        for i in gl.static_range(_PARTS):
            sums += gl.load(parts_ptr + i * PART + local, mask=(local >= 0) & (i < split), other=0.0, cache_modifier=".cg")
    return sums


@gluon.jit(do_not_specialize=["M", "G", "whole", "split"])
def hopper_dot_kernel(
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
    whole,
    split,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    MORE_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLITS: gl.constexpr,
    GROUP_N: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One tile of out = x @ W.T + b, BLOCK_N features by BLOCK_M + MORE_M rows; with SPLITS, tiles from `whole` on
    in `split` parts of K, each a program.

    MORE_M: 0, or rows of a second sum. Sizes of tensors are powers of two, and a tile of 96 rows serves 96 rows best.
    A step is a block of 64 columns, of which K is a multiple: they are a row of the swizzled layout that products read.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    TILE_M: gl.constexpr = BLOCK_M + MORE_M
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = words_layout(BLOCK_N, WARPS)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    COPY_W: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [WARPS, 1], [1, 0])
    X_SMEM: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    # Lanes read words without bank conflicts.
    W_SMEM: gl.constexpr = gl.SwizzledSharedLayout(4, 4, 2, [1, 0])
    # Two steps lie in one group, or one does, or its halves may have one each. Parts of K begin with an even step.
    GROUP_STEPS: gl.constexpr = 2 if GROUP != 0 and GROUP % 128 == 0 else 1
    HALVES: gl.constexpr = GROUP % 64 != 0
    pid = gl.program_id(0)
    tile = pid
    first = 0
    last = W // 8
    if SPLITS:
        divided = pid >= whole
        at = gl.maximum(pid - whole, 0)
        if divided:
            steps = gl.cdiv(gl.cdiv(last, GROUP_STEPS), split) * GROUP_STEPS
            tile = whole + at // split
            first = at % split * steps
            last = gl.minimum(first + steps, last)
    pid_m, pid_n = tile_at(tile, M, N, TILE_M, BLOCK_N, GROUP_N)

    x_smem = ()
    w_smem = ()
    for _ in gl.static_range(_STAGES):
        x_smem += (gl.allocate_shared_memory(dtype, [BLOCK_M, 64], X_SMEM),)
        w_smem += (gl.allocate_shared_memory(gl.int32, [BLOCK_N, 8], W_SMEM),)

    # Rows of x past the end are others, features the last one, and neither are stored: so no copy needs a mask of its own.
    # Its addresses go on by constants: of the integer instructions of a step, which are scarce, most were for them.
    first_m = pid_m * TILE_M
    x_ptr += first_m.to(gl.int64) * stride_x + first * 64
    copy_m = _rows(first_m, gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY_X)), M - first_m, TILE_M)
    columns = gl.arange(0, 64, gl.SliceLayout(0, COPY_X))[None, :]
    x_ptrs = x_ptr + (copy_m[:, None] * stride_x + columns)
    packed_ptr += (pid_n * BLOCK_N).to(gl.int64) * W + first * 128
    copy_n = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY_W)), N - 1 - pid_n * BLOCK_N)
    w_ptrs = packed_ptr + (row_offset(copy_n, W)[:, None] + word_offset(gl.arange(0, 8, gl.SliceLayout(0, COPY_W)))[None, :])
    rows_n = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, WORDS)), N - 1)
    if MORE_M:
        MORE_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MORE_M, 16])
        more_m = _rows(first_m, BLOCK_M + gl.arange(0, MORE_M, gl.SliceLayout(1, COPY_X)), M - first_m, TILE_M)
        y_ptrs = x_ptr + (more_m[:, None] * stride_x + columns)
        y_smem = ()
        for _ in gl.static_range(_STAGES):
            y_smem += (gl.allocate_shared_memory(dtype, [MORE_M, 64], X_SMEM),)
        more = gl.zeros([BLOCK_N, MORE_M], gl.float32, MORE_SUMS)

    _copy(w_smem[0], w_ptrs, first < last)
    for i in gl.static_range(_STAGES - 2):
        there = first + i < last
        _copy(w_smem[i + 1], w_ptrs + (i + 1) * 128, first + i + 1 < last)
        _copy(x_smem[i], x_ptrs + i * 64, there)
        if MORE_M:
            _copy(y_smem[i], y_ptrs + i * 64, there)
        async_copy.commit_group()
    s0, z0 = load_group(scales_ptr, zeros_ptr, group_at(first, G, GROUP, 64, 0), rows_n, G, HAS_ZEROS)
    s1, z1 = s0, z0
    if HALVES:
        s1, z1 = load_group(scales_ptr, zeros_ptr, group_at(first, G, GROUP, 64, 1), rows_n, G, HAS_ZEROS)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    # Once at least: a path around the loop, where other instructions write sums that the last wait covers, makes ptxas wait
    # after every product (its C7515; a third of the rate).
    end = gl.maximum(last, first + 1)
    gl.assume(end > first)
    async_copy.wait_group(_STAGES - 3)
    words = w_smem[0].load(WORDS)
    for start in range(first, end, _STAGES):
        for i in gl.static_range(_STAGES):
            # Past the last step x is zeros.
            step = start + i
            # This step has arrived, and words of the next. A barrier follows: for all, and all left step - 2.
            async_copy.wait_group(_STAGES - 3)
            there = step + (_STAGES - 2) < last
            _copy(w_smem[(i + _STAGES - 1) % _STAGES], w_ptrs + (i + _STAGES - 1) * 128, step + (_STAGES - 1) < last)
            _copy(x_smem[(i + _STAGES - 2) % _STAGES], x_ptrs + (i + _STAGES - 2) * 64, there)
            if MORE_M:
                _copy(y_smem[(i + _STAGES - 2) % _STAGES], y_ptrs + (i + _STAGES - 2) * 64, there)
            async_copy.commit_group()
            if i % GROUP_STEPS == 0:
                a0, b0 = pair_constants(s0, z0, dtype, PACKED, HAS_ZEROS)
                a1, b1 = a0, b0
                after = step + GROUP_STEPS
                if HALVES:
                    a1, b1 = pair_constants(s1, z1, dtype, PACKED, HAS_ZEROS)
                    s1, z1 = load_group(scales_ptr, zeros_ptr, group_at(after, G, GROUP, 64, 1), rows_n, G, HAS_ZEROS)
                if GROUP != 0:
                    s0, z0 = load_group(scales_ptr, zeros_ptr, group_at(after, G, GROUP, 64, 0), rows_n, G, HAS_ZEROS)
            now = words
            words = w_smem[(i + 1) % _STAGES].load(WORDS)
            for j in gl.static_range(4):
                w = weight_pairs(now, a0 if j < 2 else a1, b0 if j < 2 else b1, j, dtype, HAS_ZEROS, PACKED, True)
                quarter = x_smem[i].slice(16 * j, 16, 1).permute((1, 0))
                acc = warpgroup_mma(gl.convert_layout(w, LEFT), quarter, acc, is_async=True)
                if MORE_M:
                    quarter = y_smem[i].slice(16 * j, 16, 1).permute((1, 0))
                    w = gl.convert_layout(w, gl.DotOperandLayout(0, MORE_SUMS, 2))
                    more = warpgroup_mma(w, quarter, more, is_async=True)
            # The products of this step go on, those of the step before end.
            if MORE_M:
                acc, more = warpgroup_mma_wait(8, [acc, more])
            else:
                acc = warpgroup_mma_wait(4, [acc])
        w_ptrs += _STAGES * 128
        x_ptrs += _STAGES * 64
        if MORE_M:
            y_ptrs += _STAGES * 64
    if MORE_M:
        acc, more = warpgroup_mma_wait(0, [acc, more])
    else:
        acc = warpgroup_mma_wait(0, [acc])
    # ptxas 12.8 moves what uses the sums to before that wait. So they are first added to what comes from memory behind a
    # barrier, which does not move: the bias, or zeros.
    first_n = pid_n * BLOCK_N
    bias = _bias(bias_ptr, first_n, N, BLOCK_N, gl.SliceLayout(1, COPY_W), HAS_BIAS)
    if SPLITS:
        bias = gl.where(divided, 0.0, bias)
    behind = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    behind.store(bias)
    tl.debug_barrier()
    acc += behind.load(gl.SliceLayout(1, SUMS))[:, None]
    if MORE_M:
        more += behind.load(gl.SliceLayout(1, MORE_SUMS))[:, None]
    done = True
    if SPLITS and divided:
        part = parts_ptr + at.to(gl.int64) * (BLOCK_N * TILE_M)
        local = _in_part(BLOCK_N, 0, BLOCK_M, SUMS)
        gl.store(part + local, acc)
        if MORE_M:
            local_more = _in_part(BLOCK_N, BLOCK_M, MORE_M, MORE_SUMS)
            gl.store(part + local_more, more)
        tl.debug_barrier()  # every thread's part is written before the one that counts it
        arrived = gl.atomic_add(counters_ptr + (tile - whole), 1, sem="acq_rel")
        done = arrived == split - 1
        if done:
            gl.store(counters_ptr + (tile - whole), 0)  # ready for the next launch
            mine = parts_ptr + ((tile - whole) * split).to(gl.int64) * (BLOCK_N * TILE_M)
            acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
            acc = _sum_parts(mine, local, acc, BLOCK_N * TILE_M, split)
            acc += _bias(bias_ptr, first_n, N, BLOCK_N, gl.SliceLayout(1, SUMS), HAS_BIAS)[:, None]
            if MORE_M:
                more = gl.zeros([BLOCK_N, MORE_M], gl.float32, MORE_SUMS)
                more = _sum_parts(mine, local_more, more, BLOCK_N * TILE_M, split)
                more += _bias(bias_ptr, first_n, N, BLOCK_N, gl.SliceLayout(1, MORE_SUMS), HAS_BIAS)[:, None]
    if done:
        _store(acc, out_ptr, first_n, first_m, N, M, stride_out)
        if MORE_M:
            _store(more, out_ptr, first_n, first_m + BLOCK_M, N, M, stride_out)
