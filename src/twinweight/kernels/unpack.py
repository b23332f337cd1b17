"""What all kernels share: 4-bit values to the canonical 16-bit weight, and the checks of the tensors that hold them.

The kernels' layout is that of `order.py`: a word holds columns 2i and 2i + 1 of each quarter of a block of 64, the even ones
in its low half. One shift and one mask so give two neighbouring columns, each in the mantissa of its own 16-bit float, and
arithmetic goes two weights an instruction where the GPU has that for the dtype.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forms import DeviceTraits
from .order import BLOCK, BLOCK_WORDS, padded_rows, padded_words
from .prepared import takes_group

FLOAT_TYPES = (torch.bfloat16, torch.float16)


def _ptx(dtype: str, *, zeros: bool, scaled: bool) -> tl.constexpr:
    """Two weights of a word, $1, at once: nibbles at the feet of mantissas whose exponent makes them bias + q.

    lop3 masks and sets the exponent in one instruction (with two immediates ptxas takes two). Then, in 16 bits, bias + zero
    point is subtracted, exactly, and the scale multiplied, rounding once; -0.0 is what a product adds to stay itself.
    """
    bias, one, minus = ("64006400", "3C003C00", "E408E408") if dtype == "f16" else ("43004300", "3F803F80", "C308C308")
    steps = [
        ".reg .b32 t, one, z;",
        f"lop3.b32 t, $1, 0x000F000F, 0x{bias}, 0xEA;",
        f"mov.b32 one, 0x{one};",
        "mov.b32 z, $2;" if zeros else f"mov.b32 z, 0x{minus};",
        f"fma.rn.{dtype}x2 {'t' if scaled else '$0'}, t, one, z;",
    ]
    if scaled:
        steps += ["mov.b32 z, 0x80008000;", f"fma.rn.{dtype}x2 $0, t, ${3 if zeros else 2}, z;"]
    return tl.constexpr("{ " + " ".join(steps) + " }")


LESS8_FP16: tl.constexpr = _ptx("f16", zeros=False, scaled=False)
LESS8_BF16: tl.constexpr = _ptx("bf16", zeros=False, scaled=False)
LESS_ZERO_FP16: tl.constexpr = _ptx("f16", zeros=True, scaled=False)
LESS_ZERO_BF16: tl.constexpr = _ptx("bf16", zeros=True, scaled=False)
LESS8_SCALED_FP16: tl.constexpr = _ptx("f16", zeros=False, scaled=True)
LESS8_SCALED_BF16: tl.constexpr = _ptx("bf16", zeros=False, scaled=True)
LESS_ZERO_SCALED_FP16: tl.constexpr = _ptx("f16", zeros=True, scaled=True)
LESS_ZERO_SCALED_BF16: tl.constexpr = _ptx("bf16", zeros=True, scaled=True)


@triton.jit
def tile_at(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr):
    """(pid_m, pid_n) of a program: GROUP_N tiles of N beside each other, then the next tile of M."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_n = pid // (GROUP_N * tiles_m) * GROUP_N
    here_n = tl.minimum(tiles_n - first_n, GROUP_N)
    return pid % (GROUP_N * tiles_m) // here_n, first_n + pid % (GROUP_N * tiles_m) % here_n


@triton.jit
def row_offset(rows, W):
    """Where the words of rows start, in words (see `order.py`)."""
    return rows // 16 * (16 * W) + rows % 16 * 8


@triton.jit
def word_offset(words):
    """Where words of a row stand, from the row's start; a step of S words, a multiple of 8, is 16 * S further."""
    return words // 8 * 128 + words % 8


@triton.jit
def group_at(step, G, GROUP: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr):
    """The group of a step of COLUMNS, or of its second half. Columns past the row take the last group: x is 0 there."""
    if GROUP == 0:
        g = 0
    elif GROUP % COLUMNS == 0:
        g = tl.minimum(step // (GROUP // COLUMNS), G - 1)
    else:
        g = tl.minimum((step * COLUMNS + HALF * (COLUMNS // 2)) // GROUP, G - 1)
    return g


@triton.jit
def load_group(scales_ptr, zeros_ptr, g, rows, G, HAS_ZEROS: tl.constexpr):
    """Scales and zero points, as stored, of the group `g` of rows: two [R]. Without zero points the second repeats the first.

    Rows of groups, not groups of rows: one sector of 32 bytes then serves 16 steps of K from the first-level cache.
    """
    s = tl.load(scales_ptr + rows * G + g)
    z = s
    if HAS_ZEROS:
        z = tl.load(zeros_ptr + rows * G + g)
    return s, z


@triton.jit
def twice(x):
    """16-bit floats -> int32 that hold each twice."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def biased_zero_pair(z, DTYPE: tl.constexpr):
    """Zero points [R] -> int32 [R, 1] that hold -(1024 + z) in fp16 or -(128 + z) in bf16 twice.

    A small integer is the foot of the mantissa, here too.
    """
    return ((z.to(tl.int32) * 0x10001) | (-0x1BFF1C00 if DTYPE == tl.float16 else -0x3CFF3D00))[:, None]


@triton.jit
def pair_constants(s, z, DTYPE: tl.constexpr, PACKED: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """What `weight_pairs` takes of a group: [R, 1] each, (scale, biased zero point).

    PACKED 2: int32, each of DTYPE twice, the zero point negated (0 without zero points); 1: DTYPE; 0: scale and offset, fp32.
    """
    if PACKED == 2:
        a, b = twice(s)[:, None], 0
        if HAS_ZEROS:
            b = biased_zero_pair(z, DTYPE)
    elif PACKED == 1:
        bias: tl.constexpr = 1024.0 if DTYPE == tl.float16 else 128.0
        a = s[:, None]
        if HAS_ZEROS:
            b = (z.to(tl.float32) + bias).to(DTYPE)[:, None]  # an integer below 2 * bias: exact
        else:
            b = tl.full([s.shape[0], 1], bias + 8.0, DTYPE)
    else:
        a = s.to(tl.float32)[:, None]
        if HAS_ZEROS:
            # (128 + z) * s has at most 8 + 11 significant bits: exact in fp32, and so is all that follows from it
            b = -(z.to(tl.float32)[:, None] + 128.0) * a
        else:
            b = -136.0 * a
    return a, b


@triton.jit
def weight_pairs(
    words, a, b, J: tl.constexpr, DTYPE: tl.constexpr, HAS_ZEROS: tl.constexpr, PACKED: tl.constexpr, NATIVE: tl.constexpr
):
    """Quarter J of every block: words [R, W] -> the weight, DTYPE [R, 2 * W], rounded once from exactly (q - z) * s.

    PACKED: q - z is exact in 16 bits, so the product alone rounds. Else through fp32, where both steps are exact. The nibble
    goes to the foot of the 16-bit mantissa of a power of two, which makes bias + q without a conversion.
    """
    shifted = words >> (4 * J)
    if PACKED == 2:
        if HAS_ZEROS:
            ASM: tl.constexpr = LESS_ZERO_SCALED_FP16 if DTYPE == tl.float16 else LESS_ZERO_SCALED_BF16
            bits = tl.inline_asm_elementwise(ASM, "=r,r,r,r", [shifted, b, a], dtype=tl.int32, is_pure=True, pack=1)
        else:
            ASM8: tl.constexpr = LESS8_SCALED_FP16 if DTYPE == tl.float16 else LESS8_SCALED_BF16
            bits = tl.inline_asm_elementwise(ASM8, "=r,r,r", [shifted, a], dtype=tl.int32, is_pure=True, pack=1)
        low, high = halves(bits, DTYPE)
    elif PACKED == 1:
        low, high = halves((shifted & 0x000F000F) | (0x64006400 if DTYPE == tl.float16 else 0x43004300), DTYPE)
        low, high = (low - b) * a, (high - b) * a
    else:
        bits = (shifted & 0x000F000F) | 0x43004300
        low = round_to((bits << 16).to(tl.float32, bitcast=True) * a + b, DTYPE, NATIVE, True)
        high = round_to(((bits >> 16) << 16).to(tl.float32, bitcast=True) * a + b, DTYPE, NATIVE, True)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def halves(pairs, DTYPE: tl.constexpr):
    """int32 -> the two 16-bit floats in each, the low one first."""
    return pairs.to(tl.int16).to(DTYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def weight_tile(
    words,
    a0,
    b0,
    a1,
    b1,
    DTYPE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    PACKED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """words [R, W] -> the weight, DTYPE [R, 8 * W], columns in order.

    a0, b0 and a1, b1 are the constants of the first and the second half of every block of 64 columns.
    """
    w0 = weight_pairs(words, a0, b0, 0, DTYPE, HAS_ZEROS, PACKED, NATIVE)
    w1 = weight_pairs(words, a0, b0, 1, DTYPE, HAS_ZEROS, PACKED, NATIVE)
    w2 = weight_pairs(words, a1, b1, 2, DTYPE, HAS_ZEROS, PACKED, NATIVE)
    w3 = weight_pairs(words, a1, b1, 3, DTYPE, HAS_ZEROS, PACKED, NATIVE)
    return _in_order(w0, w1, w2, w3)


@triton.jit
def _in_order(w0, w1, w2, w3):
    """The four quarters of every block, [R, 2 * W] each -> [R, 8 * W], columns in order."""
    R: tl.constexpr = w0.shape[0]
    W: tl.constexpr = w0.shape[1] // 2
    # Column 16j + c of block s stands at [r, s, c, j]: moving j before c renames registers, it moves no data.
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    blocks = tl.reshape(joined, [R, W // 8, 16, 2, 2])
    return tl.reshape(tl.permute(blocks, [0, 1, 3, 4, 2]), [R, 8 * W])


@triton.jit
def integer_pairs(words, b, J: tl.constexpr, DTYPE: tl.constexpr, HAS_ZEROS: tl.constexpr, PTX: tl.constexpr):
    """Quarter J of every block: words [R, W] -> q - z with PTX, else bias + q; exact, DTYPE [R, 2 * W].

    b: with PTX [R, 1] as `pair_constants` gives it. The bias is that of `biased_zeros`.
    """
    if PTX:
        if HAS_ZEROS:
            ASM: tl.constexpr = LESS_ZERO_FP16 if DTYPE == tl.float16 else LESS_ZERO_BF16
            bits = tl.inline_asm_elementwise(ASM, "=r,r,r", [words >> (4 * J), b], dtype=tl.int32, is_pure=True, pack=1)
        else:
            ASM8: tl.constexpr = LESS8_FP16 if DTYPE == tl.float16 else LESS8_BF16
            bits = tl.inline_asm_elementwise(ASM8, "=r,r", [words >> (4 * J)], dtype=tl.int32, is_pure=True, pack=1)
    elif DTYPE == tl.float16:
        # At bits 4 to 7 of the mantissa, beside 64: a smaller bias cancels fewer digits.
        bits = ((words << 4 if J == 0 else words >> (4 * J - 4)) & 0x00F000F0) | 0x54005400
    else:
        bits = ((words >> (4 * J)) & 0x000F000F) | 0x43004300
    low, high = halves(bits, DTYPE)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def integer_tile(words, b, DTYPE: tl.constexpr, HAS_ZEROS: tl.constexpr, PTX: tl.constexpr):
    """words [R, W] -> what `integer_pairs` makes of them, DTYPE [R, 8 * W], columns in order."""
    w0 = integer_pairs(words, b, 0, DTYPE, HAS_ZEROS, PTX)
    w1 = integer_pairs(words, b, 1, DTYPE, HAS_ZEROS, PTX)
    w2 = integer_pairs(words, b, 2, DTYPE, HAS_ZEROS, PTX)
    w3 = integer_pairs(words, b, 3, DTYPE, HAS_ZEROS, PTX)
    return _in_order(w0, w1, w2, w3)


@triton.jit
def biased_zeros(z, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """-(bias + zero point) of rows in every column, exact, DTYPE [R, COLUMNS]; z: [R] as `load_group` gives them."""
    bias: tl.constexpr = 64.0 if DTYPE == tl.float16 else 128.0
    if HAS_ZEROS:
        zeros = tl.broadcast_to((-bias - z.to(tl.float32)).to(DTYPE)[:, None], [z.shape[0], COLUMNS])
    else:
        zeros = tl.full([z.shape[0], COLUMNS], -bias - 8.0, tl.float32).to(DTYPE)
    return zeros


@triton.jit
def round_to(x, DTYPE: tl.constexpr, NATIVE: tl.constexpr, FINITE: tl.constexpr):
    """fp32 to DTYPE, to nearest even. Without NATIVE, bf16 is rounded by integer operations, as it must be where the GPU has
    no such conversion (the compiler's own expansion is longer by the NaN test that FINITE spares) or the interpreter truncates.
    """
    if NATIVE or DTYPE != tl.bfloat16:
        result = x.to(DTYPE)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        if not FINITE:
            bits = tl.where(x == x, bits, 0x7FC0)
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return result


# Triton's key of a kernel on disk holds the constants of functions that it calls only if those were hashed before it: all here
# are, or kernels that share one would be compiled again by a process that meets them in another order.
for _function in [f for f in vars().values() if isinstance(f, triton.JITFunction)]:
    _function.cache_key  # noqa: B018  (a property that keeps what it finds)


def packing(dtype: torch.dtype, scale_dtype: torch.dtype, traits: DeviceTraits) -> int:
    """The kernels' PACKED: 0 through fp32, 1 in arithmetic of `dtype` (which the scales must have), 2 the same with PTX."""
    if dtype != scale_dtype or not (dtype == torch.float16 or traits.rounds_bf16):
        return 0
    return 2 if traits.ptx else 1


def group_columns(group_size: int, groups: int) -> int:
    """The kernels' GROUP: columns in a group, 0 for one group a row."""
    return 0 if groups == 1 else group_size


def check_step(block_words: int, group: int) -> None:
    """Raises ValueError unless a step of K, in words, is a block of 64 columns or lies in one group."""
    columns = 8 * block_words
    if block_words % BLOCK_WORDS or (group % columns and columns != BLOCK):
        expected = f"{BLOCK_WORDS}, or more where they divide a group of {group} columns"
        raise ValueError(f"block_words: expected {expected}, found {block_words}")


def check_turns(block_words: int, depth: int, split_k: int, k: int, group: int) -> int:
    """The pairs of turns that K is, the last of which may be one turn. Raises ValueError unless it is whole turns, a pair for
    each part at least, and a step lies in one group.
    """
    columns = 8 * block_words
    pairs = -(-k // (2 * columns * depth))
    if block_words not in (8, 16) or group % columns or k % (columns * depth) or split_k > pairs:
        found = f"{depth} steps of {columns} columns, K in {split_k} parts"
        raise ValueError(f"tiles: expected turns of one group's steps for K={k} in groups of {group or k}, found {found}")
    return pairs


def check_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, *, group_size: int, k: int) -> tuple[int, int, int]:
    """(N, words a row, groups) of an int4 weight in the kernels' order, K = `k`. Raises ValueError that names the tensor."""
    n, words = scales.shape[0], padded_words(k)
    if packed.dtype != torch.int32 or packed.shape != (padded_rows(n), words):
        expected = f"int32 [{padded_rows(n)}, {words}] for N={n}, K={k}"
        raise ValueError(f"packed: expected {expected}, found {packed.dtype} {list(packed.shape)}")
    if group_size <= 0 or not takes_group(k, group_size):
        raise ValueError(f"group_size: expected K={k} or a multiple of 32 that divides it, found {group_size}")
    groups = k // group_size
    if scales.dtype not in FLOAT_TYPES or scales.shape != (n, groups):
        raise ValueError(f"scales: expected bf16 or fp16 [{n}, {groups}], found {scales.dtype} {list(scales.shape)}")
    if zeros is not None and (zeros.dtype != torch.int16 or zeros.shape != (n, groups)):
        raise ValueError(f"zeros: expected int16 [{n}, {groups}] or None, found {zeros.dtype} {list(zeros.shape)}")
    for name, tensor in (("packed", packed), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found strides {tensor.stride()}")
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"{name}: expected device {packed.device}, found {tensor.device}")
    return n, words, groups


def check_linear(x: Tensor, bias: Tensor | None, out: Tensor | None, *, n: int, device: torch.device) -> None:
    """Raises ValueError where x, bias or out do not fit a weight of `n` output features."""
    if x.ndim != 2 or x.dtype not in FLOAT_TYPES or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x: expected bf16 or fp16 [M, K] with contiguous rows, found {x.dtype} {list(x.shape)}, {x.stride()}")
    if bias is not None and (bias.dtype not in FLOAT_TYPES or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(
            f"bias: expected contiguous bf16 or fp16 [{n}], found {bias.dtype} {list(bias.shape)}, {bias.stride()}"
        )
    if out is not None and (out.shape != (x.shape[0], n) or out.dtype != x.dtype or (n > 1 and out.stride(1) != 1)):
        raise ValueError(
            f"out: expected {x.dtype} [{x.shape[0]}, {n}] with contiguous rows, "
            f"found {out.dtype} {list(out.shape)}, {out.stride()}"
        )
    for name, tensor in (("x", x), ("bias", bias), ("out", out)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, found {tensor.device}")
