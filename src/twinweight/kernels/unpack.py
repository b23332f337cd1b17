"""What all kernels share: 4-bit values to the canonical 16-bit weight, and the checks of the tensors that hold them."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT_TYPES = (torch.bfloat16, torch.float16)


@triton.jit
def group_constants(
    scales_ptr, zeros_ptr, rows, words, first_word, G, GROUP_WORDS: tl.constexpr, BLOCK_W: tl.constexpr, HAS_ZEROS: tl.constexpr
):
    """Scale s and offset c = -(128 + z) * s of a tile, fp32, [rows, 1] where the tile lies in one group, else [rows, words].

    GROUP_WORDS: words in a group, 0 for one group a row. Words past the row take the last group: x is 0 there.
    """
    if GROUP_WORDS == 0:
        at = rows[:, None] * G
    elif GROUP_WORDS % BLOCK_W == 0:
        at = rows[:, None] * G + tl.minimum(first_word // GROUP_WORDS, G - 1)
    else:
        at = rows[:, None] * G + tl.minimum(words // GROUP_WORDS, G - 1)[None, :]
    s = tl.load(scales_ptr + at).to(tl.float32)
    if HAS_ZEROS:
        # (128 + z) * s has at most 8 + 11 significant bits: exact in fp32, and so is all that follows from it
        c = -(tl.load(zeros_ptr + at).to(tl.float32) + 128.0) * s
    else:
        c = -136.0 * s
    return s, c


@triton.jit
def weight_column(words, s, c, J: tl.constexpr):
    """Column J of 8 in each word: exactly (q - z) * s in fp32, by one shift, one and-or and one fma.

    The nibble goes to the top of the mantissa of 128.0, which makes 128 + q without an integer conversion.
    """
    if J < 4:
        bits = words << (16 - 4 * J)
    else:
        bits = words >> (4 * J - 16)
    return ((bits & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True) * s + c


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


def group_words(group_size: int, groups: int) -> int:
    """The kernels' GROUP_WORDS: 8-column words in a group, 0 for one group a row."""
    return 0 if groups == 1 else group_size // 8


def check_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, *, group_size: int, k: int) -> tuple[int, int, int]:
    """(N, words a row, groups) of an int4 weight with K = `k`. Raises ValueError that names the tensor at fault."""
    if packed.ndim != 2 or packed.dtype != torch.int32 or packed.shape[1] != -(-k // 8):
        raise ValueError(f"packed: expected int32 [N, {-(-k // 8)}] for K={k}, found {packed.dtype} {list(packed.shape)}")
    n, words = packed.shape
    if group_size <= 0 or k % group_size or (group_size != k and group_size % 32):
        raise ValueError(f"group_size: expected K={k} or a multiple of 32 that divides it, found {group_size}")
    groups = k // group_size
    if scales.dtype not in FLOAT_TYPES or scales.shape != (n, groups):
        raise ValueError(f"scales: expected bf16 or fp16 [{n}, {groups}], found {scales.dtype} {list(scales.shape)}")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != (n, groups)):
        raise ValueError(f"zeros: expected uint8 [{n}, {groups}] or None, found {zeros.dtype} {list(zeros.shape)}")
    for name, tensor in (("packed", packed), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, found strides {tensor.stride()}")
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"{name}: expected device {packed.device}, found {tensor.device}")
    return n, words, groups


def check_linear(x: Tensor, bias: Tensor | None, out: Tensor | None, *, n: int, device: torch.device) -> Tensor:
    """The output [M, N] of x: `out`, or a new one. Raises ValueError where x, bias or out do not fit."""
    if x.ndim != 2 or x.dtype not in FLOAT_TYPES or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x: expected bf16 or fp16 [M, K] with contiguous rows, found {x.dtype} {list(x.shape)}, {x.stride()}")
    if bias is not None and (bias.dtype not in FLOAT_TYPES or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(
            f"bias: expected contiguous bf16 or fp16 [{n}], found {bias.dtype} {list(bias.shape)}, {bias.stride()}"
        )
    if out is None:
        out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    elif out.shape != (x.shape[0], n) or out.dtype != x.dtype or (n > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out: expected {x.dtype} [{x.shape[0]}, {n}] with contiguous rows, "
            f"found {out.dtype} {list(out.shape)}, {out.stride()}"
        )
    for name, tensor in (("x", x), ("bias", bias), ("out", out)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, found {tensor.device}")
    return out
