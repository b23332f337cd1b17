"""`int4` on NVIDIA: every warp has a stream of words of its own, from memory to registers and from there into products.

`fused.py` brings words to shared memory, and all warps of a program meet twice for each step. In the order of `order.py` a lane
finds the words that its products take side by side, and Gluon lets layouts be said: here they are loaded where they are used,
`depth` steps ahead. x alone, which all warps need, goes through shared memory, and they meet once in `depth` steps.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,operator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .forms import MOST_PARTS
from .unpack import biased_zero_pair, group_at, integer_tile

load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # its name to Triton 3.7
_PARTS = gl.constexpr(MOST_PARTS)


@gluon.constexpr_function
def words_layout(rows, words, warps, halves):
    """Words [rows, words]: of each block a lane holds words 2 * (lane % 4) and the next, of rows lane // 4 and lane // 4 + 8,
    which are four neighbouring columns of each 16. With `halves` the same words, as `_in_halves` names them.
    """
    pair, lanes = ([0, 4], [[0, 1], [0, 2]]) if halves else ([0, 1], [[0, 2], [0, 4]])
    blocks = [[0, 8 << i] for i in range((words // 8).bit_length() - 1)]
    repeats = [[16 * warps << i, 0] for i in range((rows // (16 * warps)).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [pair, [8, 0], *blocks, *repeats], [*lanes, [1, 0], [2, 0], [4, 0]],
        [[16 << i, 0] for i in range(warps.bit_length() - 1)], [], [rows, words],
    )  # fmt: skip


@gluon.constexpr_function
def x_layout(columns, rows, warps):
    """x transposed, [columns, rows]: a lane holds columns 4 * (lane % 4) to the fourth of each 16, of row lane // 4."""
    steps = [[16 << i, 0] for i in range((columns // 16).bit_length() - 1)]
    repeats = [[0, 8 << i] for i in range((rows // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[1, 0], [2, 0], *steps, *repeats], [[4, 0], [8, 0], [0, 1], [0, 2], [0, 4]],
        [[0, 0]] * (warps.bit_length() - 1), [], [columns, rows],
    )  # fmt: skip


@gluon.jit
def _in_halves(words):
    """Words [R, 8 * B] with those at even places of every block first: a product takes the lane's two as its two halves."""
    R: gl.constexpr = words.shape[0]
    W: gl.constexpr = words.shape[1]
    return words.reshape([R, W // 8, 4, 2]).permute((0, 1, 3, 2)).reshape([R, W])


@gluon.jit
def _columns_in_halves(x):
    """Columns of x [16 * B, R] in the order that `_in_halves` gives the weight's."""
    K: gl.constexpr = x.shape[0]
    R: gl.constexpr = x.shape[1]
    return x.reshape([K // 16, 4, 2, 2, R]).permute((0, 2, 1, 3, 4)).reshape([K, R])


@gluon.jit
def _copy_x(smem, x_ptr, offs, inside, FIRST: gl.constexpr, DEPTH: gl.constexpr):
    """Begin to copy the x of DEPTH steps into buffers from FIRST on; rows that are not inside become zeros."""
    for i in gl.static_range(DEPTH):
        load_async(smem[FIRST + i], x_ptr + i * smem[0].shape[1] + offs, mask=inside)
    async_copy.commit_group()


@gluon.jit
def load_groups(ptr, rows, step, G, GROUP: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr):
    """Scales or zero points of DEPTH steps from `step` on, 16 bits each; of two steps, each a group, as one word."""
    found = ()
    if DEPTH == 2 and GROUP == COLUMNS:
        found += (gl.load((ptr + rows * G + step).to(gl.pointer_type(gl.int32), bitcast=True)),)
    else:
        for i in gl.static_range(DEPTH):
            found += (gl.load(ptr + rows * G + group_at(step + i, G, GROUP, COLUMNS, 0)),)
    return found


@gluon.jit
def group_of(found, i: gl.constexpr, DEPTH: gl.constexpr, DTYPE: gl.constexpr):
    """What `load_groups` found for step `i`."""
    if len(found) < DEPTH:
        value = (found[0] >> (16 * i)).to(gl.int16).to(DTYPE, bitcast=True)
    else:
        value = found[i]
    return value


@gluon.jit
def place_of(turns, whole, split, divided, short, SPLITS: gl.constexpr):
    """(tile, part, first turn, last turn) of a program: all turns of a tile, or, with SPLITS, from tile `whole` on those of one
    of `split` parts of the `divided` tiles there. A part is `short` pairs of turns or one more, since loops go by pairs.
    Programs of all first parts, which are the longer ones, come first, so that multiprocessors get equally many. There are no
    divisions, which would take longer than a turn.
    """
    tile = gl.program_id(0)
    part = -1
    first = 0
    last = turns
    if SPLITS and tile >= whole:
        part = 0
        for _ in gl.static_range(_PARTS - 1):
            if tile - whole >= divided:
                tile -= divided
                part += 1
        longer = (turns + 1 >> 1) - split * short
        first = 2 * (part * short + gl.minimum(part, longer))
        last = gl.minimum(first + 2 * (short + (part < longer).to(gl.int32)), turns)
    return tile, part, first, last


@gluon.jit
def add_parts(acc, parts_ptr, counters_ptr, at, part, split, LAYOUT: gl.constexpr):
    """(whether this program is the last of a tile's, the sums of all its parts then); acc: those of `part`; at: which tile."""
    N: gl.constexpr = acc.shape[0]
    M: gl.constexpr = acc.shape[1]
    local = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))[:, None] * M + gl.arange(0, M, gl.SliceLayout(0, LAYOUT))[None, :]
    mine = parts_ptr + at.to(gl.int64) * (split * N * M) + local
    gl.store(mine + part * (N * M), acc)
    tl.debug_barrier()  # every thread's part is written before the one that counts it
    done = gl.atomic_add(counters_ptr + at, 1, sem="acq_rel") == split - 1
    if done:
        gl.store(counters_ptr + at, 0)  # ready for the next launch
        acc = gl.zeros([N, M], gl.float32, LAYOUT)
        for i in gl.static_range(_PARTS):
            acc += gl.load(mine + i * (N * M), mask=(local >= 0) & (i < split), other=0.0, cache_modifier=".cg")
    return done, acc


@gluon.jit
def store_tile(acc, bias_ptr, out_ptr, first_n, first_m, N, M, stride_out, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr):
    """Round sums [features, rows] and the bias once and store them."""
    n = first_n + gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    m = first_m + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    if HAS_BIAS:
        acc += gl.load(bias_ptr + gl.minimum(n, N - 1)).to(gl.float32)[:, None]
    offsets = m.to(gl.int64)[None, :] * stride_out + n[:, None]
    gl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@gluon.jit(do_not_specialize=["M", "G", "whole", "split", "divided", "short"])
def ampere_dot_kernel(
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
    divided,
    short,
    GROUP: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_W: gl.constexpr,
    DEPTH: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """One tile of out = x @ W.T + b, BLOCK_N features by BLOCK_M rows; with SPLITS, tiles from `whole` on in `split` parts
    of K, each a program.

    A step is BLOCK_W words, which lie in one group; K is a whole number of turns of DEPTH steps. Products take integers, and
    scales act on the sums of a step.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    BLOCK_K: gl.constexpr = 8 * BLOCK_W
    STEP: gl.constexpr = 16 * BLOCK_W  # words from a step to the next, of 16 rows stored together
    WORDS: gl.constexpr = words_layout(BLOCK_N, BLOCK_W, WARPS, False)
    HALVES: gl.constexpr = words_layout(BLOCK_N, BLOCK_W, WARPS, True)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [WARPS, 1], [1, 0])
    X_SMEM: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [1, 0])  # lanes read 8 bytes each without bank conflicts
    LOAD_X: gl.constexpr = x_layout(BLOCK_K, BLOCK_M, WARPS)
    pid_m = gl.program_id(1)
    pid_n, part, first, last = place_of(W // (BLOCK_W * DEPTH), whole, split, divided, short, SPLITS)
    first *= DEPTH
    last *= DEPTH

    # Two sets of buffers, each an allocation of its own, so that the compiler sees that a copy into one does not meet a read
    # of the other, and one barrier a turn is left.
    x_smem = ()
    for _ in gl.static_range(2 * DEPTH):
        x_smem += (gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_K], X_SMEM),)
    x_ptr += (pid_m * BLOCK_M).to(gl.int64) * stride_x
    copy_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY_X))[:, None]
    x_offs = copy_m * stride_x + gl.arange(0, BLOCK_K, gl.SliceLayout(0, COPY_X))[None, :]
    x_inside = copy_m < M - pid_m * BLOCK_M

    # Past the end features repeat the last one, words those of the last 16 rows stored; they are never stored. The offsets are
    # wide, so that the compiler sees constants between them: one address a lane then serves a turn.
    packed_ptr += (pid_n * BLOCK_N).to(gl.int64) * W
    words_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, WORDS))
    blocks_n = gl.minimum(words_n // 16, (N - 1) // 16 - pid_n * (BLOCK_N // 16))
    word = gl.arange(0, BLOCK_W, gl.SliceLayout(0, WORDS))
    w_offs = (blocks_n.to(gl.int64) * (16 * W) + words_n % 16 * 8)[:, None] + (word // 8 * 128 + word % 8)[None, :]
    rows_n = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS)), N - 1)
    zero_n = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, HALVES)), N - 1)

    words = ()
    for i in gl.static_range(DEPTH):
        words += (gl.load(packed_ptr + first * STEP + w_offs + i * STEP),)
    scales = load_groups(scales_ptr, rows_n, first, G, GROUP, BLOCK_K, DEPTH)
    zeros = ()
    if HAS_ZEROS:
        zeros = load_groups(zeros_ptr, zero_n, first, G, GROUP, BLOCK_K, DEPTH)
    _copy_x(x_smem, x_ptr + first * BLOCK_K, x_offs, x_inside, 0, DEPTH)
    AHEAD: gl.constexpr = BLOCK_N == 16 * WARPS  # twice the rows a warp leave no registers for it
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    for start in range(first, last, 2 * DEPTH):
        for turn in gl.static_range(2):
            # Past the last turn x is zeros; words, scales and zero points are those of the last.
            step = start + turn * DEPTH
            ahead = step + DEPTH
            async_copy.wait_group(0)  # this turn's x has arrived; a barrier follows: for all, and all left the turn before
            inside = x_inside & (ahead < last)
            _copy_x(x_smem, x_ptr + ahead * BLOCK_K, x_offs, inside, (turn + 1) % 2 * DEPTH, DEPTH)
            ahead = gl.minimum(ahead, last - DEPTH)
            w_ptrs = packed_ptr + ahead * STEP + w_offs
            later = ()
            if not AHEAD:
                here = gl.minimum(step, last - DEPTH)
                scales = load_groups(scales_ptr, rows_n, here, G, GROUP, BLOCK_K, DEPTH)
                if HAS_ZEROS:
                    zeros = load_groups(zeros_ptr, zero_n, here, G, GROUP, BLOCK_K, DEPTH)
            for i in gl.static_range(DEPTH):
                b = 0
                if HAS_ZEROS:
                    b = biased_zero_pair(group_of(zeros, i, DEPTH, gl.int16), dtype)
                s = group_of(scales, i, DEPTH, dtype)
                x = gl.convert_layout(_columns_in_halves(x_smem[turn * DEPTH + i].permute((1, 0)).load(LOAD_X)), RIGHT)
                w = gl.convert_layout(integer_tile(_in_halves(words[i]), b, dtype, HAS_ZEROS, True), LEFT)
                sums = mma_v2(w, x, gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS))
                later += (gl.load(w_ptrs + i * STEP),)
                acc += sums * s.to(gl.float32)[:, None]
            words = later
            if AHEAD:
                scales = load_groups(scales_ptr, rows_n, ahead, G, GROUP, BLOCK_K, DEPTH)
                if HAS_ZEROS:
                    zeros = load_groups(zeros_ptr, zero_n, ahead, G, GROUP, BLOCK_K, DEPTH)

    done = True
    if SPLITS and part >= 0:
        done, acc = add_parts(acc, parts_ptr, counters_ptr, pid_m * divided + pid_n - whole, part, split, SUMS)
    if done:
        store_tile(acc, bias_ptr, out_ptr, pid_n * BLOCK_N, pid_m * BLOCK_M, N, M, stride_out, HAS_BIAS, SUMS)
