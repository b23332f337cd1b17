"""What an op computes and must move, from the inputs that the profiler recorded.

FLOPs follow torch.utils.flop_counter: two a multiply-add in matrix products, nothing for elementwise work. Bytes are those
that must move at least: every input once, every output once, int4 weights as int4, of a table only the rows looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from twinweight.roofline.attention import attention
from twinweight.roofline.dtypes import SIZES, rate, size
from twinweight.roofline.records import Dims, Signature, Work

LABEL_GROUP = 128
"""Group size that is assumed where only a label gives the shape: scales add 1.6 % of the int4 bytes with it, 6 % with 32."""


def work_of(name: str, kind: str, inputs: Signature | None) -> Work | None:
    """The work of one call; None where its inputs were not recorded or it is not known how to count it."""
    if inputs is None or not inputs.dims:
        return None
    try:
        if kind == "w4a16":
            return _int4(name, inputs)
        if kind == "attention":
            return attention(name, inputs)
        if kind == "moe":
            return _experts(name, inputs)
        if kind == "gemm":
            return _gemm(name, inputs)
        return _memory(name, kind, inputs)
    except (IndexError, ValueError, ZeroDivisionError):
        return None  # an op of that name with other arguments than we know


def from_label(m: int, n: int, k: int, *, int4: bool, dtype: str = "c10::BFloat16") -> Work:
    """The work of a linear of which only MxNxK is known."""
    item = size(dtype)
    weight = n * k // 2 + n * -(-k // LABEL_GROUP) * item if int4 else n * k * item
    return _product(1, m, n, k, weight + (m * k + m * n) * item, dtype)


def _product(batch: int, m: int, n: int, k: int, moved: int, dtype: str) -> Work:
    flops = 2 * batch * m * n * k
    shape = f"{m}x{n}x{k}" if batch == 1 else f"{batch}x{m}x{n}x{k}"
    return Work(flops, flops, moved, rate(dtype), shape, m)


def _bytes(inputs: Signature, at: int) -> int:
    return math.prod(inputs.dims[at]) * size(inputs.types[at]) if inputs.types[at] in SIZES else 0


def _all_bytes(inputs: Signature) -> int:
    listed = sum(map(math.prod, inputs.lists)) * size("c10::BFloat16")
    return listed + sum(_bytes(inputs, i) for i in range(len(inputs.dims)))


def _gemm(name: str, inputs: Signature) -> Work | None:
    dims, types = inputs.dims, inputs.types
    base = name.rsplit("::", 1)[-1].lstrip("_")
    if base in ("mm", "int_mm", "scaled_mm", "mv", "bmm", "dot", "hipb_mm") or "scaled_mm" in base:
        # cutlass_scaled_mm(out, a, b, ...) has its output first.
        at = 1 if base.startswith("cutlass") else 0
    elif base in ("addmm", "baddbmm", "addmv", "addmm_activation"):
        at = 1
    elif base in ("linear", "linear_pointwise", "mkl_linear", "mkldnn_linear", "rocm_unquantized_gemm"):
        return _linear(dims[0], dims[1], inputs)
    elif "convolution" in base or base.startswith(("conv", "slow_conv", "thnn_conv")):
        return _convolution(inputs)
    elif base in ("wvSplitK", "LLMM1"):  # (weight, x, ...)
        return _linear(dims[1], dims[0], inputs)
    elif base == "onednn_mm":  # vLLM on CPUs: (out, x, bias, handle of the packed weight)
        (m, n), k = dims[0], dims[1][-1]
        return _product(1, m, n, k, (m * n + m * k + n * k) * size(types[1]), types[1])
    elif base == "matmul":
        return _matmul(dims[0], dims[1], inputs)
    else:
        return None
    a, b = dims[at], dims[at + 1]
    batch = a[0] if len(a) == 3 else 1
    m, k = (1, a[0]) if len(a) == 1 else (a[-2], a[-1])
    n = b[-1] if len(b) > 1 else 1
    if len(b) == 1:  # matrix times vector
        n, k = 1, b[0]
    result = 4 if base == "int_mm" else 2 if "scaled_mm" in base else size(types[at])
    return _product(batch, m, n, k, _all_bytes(inputs) + batch * m * n * result, types[at])


def _linear(x: Dims, w: Dims, inputs: Signature) -> Work:
    m, k, n = math.prod(x[:-1]), x[-1], w[0]
    return _product(1, m, n, k, _all_bytes(inputs) + m * n * size(inputs.types[0]), inputs.types[0])


def _matmul(a: Dims, b: Dims, inputs: Signature) -> Work:
    if len(b) <= 2:
        m, k, n = math.prod(a[:-1]), a[-1], b[-1] if len(b) == 2 else 1
        return _product(1, m, n, k, _all_bytes(inputs) + m * n * size(inputs.types[0]), inputs.types[0])
    batch = max(math.prod(a[:-2]), math.prod(b[:-2]))
    m, k, n = a[-2] if len(a) > 1 else 1, a[-1], b[-1]
    return _product(batch, m, n, k, _all_bytes(inputs) + batch * m * n * size(inputs.types[0]), inputs.types[0])


def _convolution(inputs: Signature) -> Work | None:
    """(input, weight, bias, stride, padding, dilation, ...), by the formula for the size of the output."""
    x, w = inputs.dims[0], inputs.dims[1]
    stride, padding, dilation = (_numbers(v, len(w) - 2) for v in inputs.values[3:6])
    out = [
        (size_ + 2 * p - d * (window - 1) - 1) // s + 1
        for size_, window, s, p, d in zip(x[2:], w[2:], stride, padding, dilation, strict=True)
    ]
    m, n, k = x[0] * math.prod(out), w[0], math.prod(w[1:])
    return _product(1, m, n, k, _all_bytes(inputs) + m * n * size(inputs.types[0]), inputs.types[0])


def _numbers(text: str, count: int) -> list[int]:
    found = [int(v) for v in re.findall(r"-?\d+", text)]
    return found * count if len(found) == 1 else found


def _int4(name: str, inputs: Signature) -> Work | None:
    """Any op that takes activations [..., K] and packed nibbles: N follows from the bytes of the packed tensor."""
    if name == "twinweight::vllm_linear":
        return None  # it takes a handle: its label, or the kernel inside, knows
    activations = next((i for i, t in enumerate(inputs.types) if t in _FLOATS and len(inputs.dims[i]) >= 2), None)
    if activations is None:
        return None
    packed = max((_bytes(inputs, i) for i, t in enumerate(inputs.types) if t in _PACKED), default=0)
    x, dtype = inputs.dims[activations], inputs.types[activations]
    m, k = math.prod(x[:-1]), x[-1]
    n, moved = 2 * packed // k, _all_bytes(inputs)
    if name == "twinweight::linear":  # N is its last argument: packed rows may be padded; the twin, its seventh, is not read
        n, moved = int(inputs.values[-1]), moved - _bytes(inputs, 6)
    elif name == "_C::cpu_gemm_wna16":  # its third is the output
        moved -= _bytes(inputs, 2)
    return _product(1, m, n, k, moved + m * n * size(dtype), dtype) if n else None


_FLOATS = frozenset(t for t, bits in SIZES.items() if bits >= 2 and ("loat" in t or "Half" in t))
_PACKED = ("int", "unsigned char", "signed char")


def _experts(name: str, inputs: Signature) -> Work | None:
    """Fused experts (x [M, K], w1 [E, 2I, K], w2 [E, K, I], weights [M, top]), or a grouped product (x [M, K], w [E, K, N]).

    Bytes: at most M * top experts are read.
    """
    dims, types = inputs.dims, inputs.types
    if name.endswith("_grouped_mm") and len(dims[0]) == 2 and len(dims[1]) == 3:
        (m, k), (experts, _, n) = dims[0], dims[1]
        read = min(m, experts) * k * n * size(types[1])
        return _product(1, m, n, k, read + m * (k + n) * size(types[0]), types[0])
    if "fused_experts" not in name or len(dims[0]) != 2 or len(dims[1]) != 3 or len(dims[3]) != 2:
        return None
    (m, k), (experts, double, _), (_, top) = dims[0], dims[1], dims[3]
    half = dims[2][-1]
    flops = 2 * m * top * (double * k + k * half)
    read = min(m * top, experts) * (_bytes(inputs, 1) + _bytes(inputs, 2)) // experts
    return Work(flops, flops, read + 2 * _bytes(inputs, 0), rate(types[0]), f"{m}x{double}x{k} top {top} of {experts}", m)


def _memory(name: str, kind: str, inputs: Signature) -> Work | None:
    """Ops that only move: no FLOPs that a matrix unit would feel."""
    if name in _ALL_OPERANDS or name.startswith("triton_"):
        moved = _all_bytes(inputs)  # outputs are among the arguments
    elif rule := _BY_NAME.get(name):
        moved = rule(inputs)
    elif kind in ("elementwise", "norm", "sampling") and name.startswith("aten::"):
        reduced = name.rstrip("_").rsplit("::", 1)[-1] in _REDUCTIONS
        # Input read, output of the largest operand's size written; an op in place writes its first operand.
        largest = _bytes(inputs, 0) if name.endswith("_") else max(_bytes(inputs, i) for i in range(len(inputs.dims)))
        moved = _all_bytes(inputs) + (0 if reduced else largest)
    else:
        return None
    return Work(0, 0, moved, rate(inputs.types[0]), "", 0)


_REDUCTIONS = frozenset(("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "norm", "var"))
_ALL_OPERANDS = frozenset(
    ("aten::copy_", "_C::silu_and_mul", "_C::gelu_and_mul", "_C::gelu_tanh_and_mul", "_C::rms_norm", "aten::masked_fill_")
)


def _rows_taken(table: int, ids: int) -> Callable[[Signature], int]:
    """Rows of a table [R, D] by ids: as many as ids are read and written."""

    def moved(inputs: Signature) -> int:
        count = math.prod(inputs.dims[ids])
        row = math.prod(inputs.dims[table][1:]) * size(inputs.types[table])
        return 2 * count * row + count * size(inputs.types[ids])

    return moved


def _concatenated(inputs: Signature) -> int:
    return 2 * _all_bytes(inputs)


def _both_ways(first: Sequence[int]) -> Callable[[Signature], int]:
    """The arguments in `first` are read and written, the others read."""
    return lambda inputs: _all_bytes(inputs) + sum(_bytes(inputs, i) for i in first)


def _rotary(inputs: Signature) -> int:
    """(positions, query, key, head size, cos_sin cache): query and key in place, one row of the cache a token."""
    count = math.prod(inputs.dims[0])
    row = inputs.dims[4][-1] * size(inputs.types[4])
    return _bytes(inputs, 0) + 2 * (_bytes(inputs, 1) + _bytes(inputs, 2)) + count * row


def _written(inputs: Signature) -> int:
    return _bytes(inputs, 0)


def _cached(inputs: Signature) -> int:
    """(key, value, caches, slots): key and value read and written, whatever the size of the caches."""
    return 2 * (_bytes(inputs, 0) + _bytes(inputs, 1)) + _bytes(inputs, 4)


_BY_NAME: dict[str, Callable[[Signature], int]] = {
    "aten::embedding": _rows_taken(0, 1), "aten::index_select": _rows_taken(0, 2), "aten::cat": _concatenated,
    "aten::stack": _concatenated, "_C::fused_add_rms_norm": _both_ways((0, 1)), "_C::rotary_embedding": _rotary,
    "aten::fill_": _written, "aten::zero_": _written, "_C_cache_ops::reshape_and_cache_flash": _cached,
    "_C_cache_ops::reshape_and_cache": _cached, "_C::cpu_attn_reshape_and_cache": _cached,
}  # fmt: skip
