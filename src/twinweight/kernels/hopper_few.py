"""`int4` on Hopper for 9 to 16 rows: products of a warp group, which read x from shared memory by themselves.

The products of `ampere.py` take 8 rows each: for 16 every lane reads twice as much of x from shared memory, and multiplies
twice. Here one instruction takes 64 features by 16 rows, and no lane holds x. That wants columns as they lie in memory, which
a lane would find in words that are not side by side; so words pass through shared memory too, from which it takes what it
needs at once. All warps meet once a turn, as they must for x anyway.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,operator,var-annotated"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .ampere import add_parts, group_of, load_async, load_groups, place_of, store_tile
from .hopper import words_layout
from .unpack import biased_zero_pair, integer_pairs


@gluon.jit
def _copy(x_smem, w_smem, x_ptrs, w_ptrs, there, TO: gl.constexpr, AHEAD: gl.constexpr, DEPTH: gl.constexpr):
    """Begin to copy a turn, AHEAD steps from where the pointers are, into buffers from TO on; zeros where it is not there."""
    for i in gl.static_range(DEPTH):
        load_async(x_smem[TO + i], x_ptrs + (AHEAD + i) * 64, mask=there)
        load_async(w_smem[TO + i], w_ptrs + (AHEAD + i) * 128, mask=there)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["M", "G", "whole", "split", "divided", "short"])
def hopper_few_dot_kernel(
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
    DEPTH: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """One tile of out = x @ W.T + b, BLOCK_N features by BLOCK_M rows; with SPLITS, tiles from `whole` on in `split` parts
    of K, each a program.

    A step is a block of 64 columns; K is a whole number of turns of DEPTH steps, and two steps lie in one group, or one does.
    Products take integers, and scales act on the sums of a group.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = words_layout(BLOCK_N, WARPS)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    COPY_W: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [WARPS, 1], [1, 0])
    X_SMEM: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    W_SMEM: gl.constexpr = gl.SwizzledSharedLayout(4, 4, 2, [1, 0])  # lanes read words without bank conflicts
    GROUP_STEPS: gl.constexpr = 2 if GROUP % 128 == 0 and DEPTH % 2 == 0 else 1
    GROUPS: gl.constexpr = DEPTH // GROUP_STEPS
    pid_m = gl.program_id(1)
    pid_n, part, first, last = place_of(W // (8 * DEPTH), whole, split, divided, short, SPLITS)
    first *= DEPTH
    last *= DEPTH

    # Two sets of buffers, each an allocation of its own, so that the compiler sees that a copy into one does not meet a read
    # of the other, and one barrier a turn is left.
    x_smem = ()
    w_smem = ()
    for _ in gl.static_range(2 * DEPTH):
        x_smem += (gl.allocate_shared_memory(dtype, [BLOCK_M, 64], X_SMEM),)
        w_smem += (gl.allocate_shared_memory(gl.int32, [BLOCK_N, 8], W_SMEM),)

    # Past the end rows repeat the last one, features those of the last 16 rows stored, and neither are stored: so no copy needs
    # a mask of its own, and addresses go on by constants.
    x_ptr += (pid_m * BLOCK_M).to(gl.int64) * stride_x + first * 64
    copy_m = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY_X)), M - 1 - pid_m * BLOCK_M)
    x_ptrs = x_ptr + (copy_m[:, None] * stride_x + gl.arange(0, 64, gl.SliceLayout(0, COPY_X))[None, :])
    packed_ptr += (pid_n * BLOCK_N).to(gl.int64) * W + first * 128
    copy_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY_W))
    blocks_n = gl.minimum(copy_n // 16, (N - 1) // 16 - pid_n * (BLOCK_N // 16))
    word = gl.arange(0, 8, gl.SliceLayout(0, COPY_W))
    w_ptrs = packed_ptr + ((blocks_n.to(gl.int64) * (16 * W) + copy_n % 16 * 8)[:, None] + word[None, :])
    rows_n = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS)), N - 1)
    zero_n = gl.minimum(pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, WORDS)), N - 1)

    _copy(x_smem, w_smem, x_ptrs, w_ptrs, first < last, 0, 0, DEPTH)
    scales = load_groups(scales_ptr, rows_n, first // GROUP_STEPS, G, GROUP, 64 * GROUP_STEPS, GROUPS)
    zeros = ()
    if HAS_ZEROS:
        zeros = load_groups(zeros_ptr, zero_n, first // GROUP_STEPS, G, GROUP, 64 * GROUP_STEPS, GROUPS)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    end = gl.maximum(last, first + 1)  # once at least, which the compiler then knows
    gl.assume(end > first)
    for start in range(first, end, 2 * DEPTH):
        for turn in gl.static_range(2):
            # Past the last turn x and words are zeros; scales and zero points are those of the last.
            ahead = start + (turn + 1) * DEPTH
            async_copy.wait_group(0)  # this turn has arrived; a barrier follows: for all, and all left the turn before
            _copy(x_smem, w_smem, x_ptrs, w_ptrs, ahead < last, (turn + 1) % 2 * DEPTH, (turn + 1) * DEPTH, DEPTH)
            for g in gl.static_range(GROUPS):
                b = 0
                if HAS_ZEROS:
                    b = biased_zero_pair(group_of(zeros, g, GROUPS, gl.int16), dtype)
                sums = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
                for i in gl.static_range(GROUP_STEPS):
                    words = w_smem[turn * DEPTH + g * GROUP_STEPS + i].load(WORDS)
                    for j in gl.static_range(4):
                        w = gl.convert_layout(integer_pairs(words, b, j, dtype, HAS_ZEROS, True), LEFT)
                        x = x_smem[turn * DEPTH + g * GROUP_STEPS + i].slice(16 * j, 16, 1).permute((1, 0))
                        sums = warpgroup_mma(w, x, sums, use_acc=i + j > 0, is_async=True)
                acc += warpgroup_mma_wait(0, [sums]) * group_of(scales, g, GROUPS, dtype).to(gl.float32)[:, None]
            ahead = gl.minimum(ahead, last - DEPTH) // GROUP_STEPS
            scales = load_groups(scales_ptr, rows_n, ahead, G, GROUP, 64 * GROUP_STEPS, GROUPS)
            if HAS_ZEROS:
                zeros = load_groups(zeros_ptr, zero_n, ahead, G, GROUP, 64 * GROUP_STEPS, GROUPS)
        x_ptrs += 2 * DEPTH * 64
        w_ptrs += 2 * DEPTH * 128

    done = True
    if SPLITS and part >= 0:
        done, acc = add_parts(acc, parts_ptr, counters_ptr, pid_m * divided + pid_n - whole, part, split, SUMS)
    if done:
        store_tile(acc, bias_ptr, out_ptr, pid_n * BLOCK_N, pid_m * BLOCK_M, N, M, stride_out, HAS_BIAS, SUMS)
