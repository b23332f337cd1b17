"""e4m3 twins on GPUs: the weight in one of two 8-bit forms, activations quantized on the fly, products by `torch._scaled_mm`.

`exact`: the int4 grid itself, q - zero in -15..15, which e4m3 holds exactly, with the group scales as 1x128 scales in fp32:
only activations are rounded. `row`: the dense weight with one scale a row, for the fastest product: both sides are rounded.
Layouts that `torch._scaled_mm` asks for (torch 2.11 to 2.13): x row-major, the weight transposed, scales of one row each [M, 1]
and [1, N], scales of groups with neighbouring rows side by side.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinweight.errors import UnsupportedError

from .expand import expand
from .launch import Launch, Plan, plan
from .prepared import TILE_BYTES, KernelWeight
from .unpack import FLOAT_TYPES, check_weight, group_at, row_offset, weight_tile, word_offset

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite e4m3 value."""

GROUP = 128
"""Columns of one scale of the `exact` form: the only such granularity that `torch._scaled_mm` has."""

_GRID_ROWS = 32
_SCALE_ROWS = 4  # cuBLAS wants columns of scales to start at multiples of 16 bytes (M = 17 fails in 2.11 with CUDA 13)
_LARGEST = tl.constexpr(LARGEST)
_LEAST = tl.constexpr(1e-30)  # of a scale: a row of zeros stays zeros


@triton.jit
def _rows_kernel(x_ptr, out_ptr, scale_ptr, K, stride_x, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """One row: its largest magnitude over 448 is its scale. The row stays in registers between the two uses."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    if EVEN_K:
        x = tl.load(x_ptr + row * stride_x + columns)
    else:
        x = tl.load(x_ptr + row * stride_x + columns, mask=columns < K, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x).to(tl.float32), axis=0) / _LARGEST, _LEAST)
    y = (x.to(tl.float32) * (1.0 / scale)).to(out_ptr.dtype.element_ty)
    if EVEN_K:
        tl.store(out_ptr + row * K + columns, y)
    else:
        tl.store(out_ptr + row * K + columns, y, mask=columns < K)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _groups_kernel(x_ptr, out_ptr, scale_ptr, M, R, K, stride_x, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """BLOCK_M rows by BLOCK_G groups of 128 columns; scales go to [K / 128, R], rows side by side. Rows M to R are zeros."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_G * 128 + tl.arange(0, BLOCK_G * 128)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    written = (rows < R)[:, None] & (columns < K)[None, :]
    inside = written & (rows < M)[:, None]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    blocks = tl.reshape(x, [BLOCK_M, BLOCK_G, 128])
    scale = tl.maximum(tl.max(tl.abs(blocks), axis=2) / _LARGEST, _LEAST)
    y = tl.reshape(blocks * (1.0 / scale)[:, :, None], [BLOCK_M, BLOCK_G * 128])
    tl.store(out_ptr + rows[:, None].to(tl.int64) * K + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=written)
    known = (rows < R)[:, None] & (groups < K // 128)[None, :]
    tl.store(scale_ptr + groups[None, :].to(tl.int64) * R + rows[:, None], scale, mask=known)


@triton.jit
def _grid_kernel(
    packed_ptr, zeros_ptr, out_ptr, N, K, W, G, GROUP_SIZE: tl.constexpr, HAS_ZEROS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """BLOCK_N rows by 128 columns of q - zero. Every step is exact: small integers in fp16."""
    step = tl.program_id(0) % (K // 128)
    rows = tl.minimum(tl.program_id(0) // (K // 128) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    words = tl.load(packed_ptr + row_offset(rows.to(tl.int64), W)[:, None] + word_offset(step * 16 + tl.arange(0, 16))[None, :])
    a = tl.full([BLOCK_N, 1], 1.0, tl.float16)
    if HAS_ZEROS:
        z = tl.load(zeros_ptr + rows * G + group_at(step, G, GROUP_SIZE, 128, 0))
        b = (z.to(tl.float32) + 1024.0).to(tl.float16)[:, None]
    else:
        b = tl.full([BLOCK_N, 1], 1032.0, tl.float16)
    w = weight_tile(words, a, b, a, b, tl.float16, HAS_ZEROS, 1, False)
    columns = step * 128 + tl.arange(0, 128)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * K + columns[None, :], w.to(tl.float32).to(out_ptr.dtype.element_ty))


def supported(device: torch.device) -> bool:
    """Whether the GPU multiplies e4m3 (NVIDIA from compute capability 8.9; 1x128 scales from 9.0)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: bf16 or fp16 [M, K], any row stride -> (e4m3 [M, K], fp32 [M]): x is about the first times the second, row by row.

    out: e4m3 [M, K], contiguous, to write into; or None. Raises ValueError for another dtype or shape.
    """
    launch = _known(_rows_plan, x).launch
    if out is None:
        out = x.new_empty(x.shape, dtype=E4M3)
    elif out.shape != x.shape or out.dtype != E4M3 or not out.is_contiguous():
        wanted = f"contiguous {E4M3} {list(x.shape)}"
        raise ValueError(f"out: expected {wanted}, found {out.dtype} {list(out.shape)}, {out.stride()}")
    scale = x.new_empty(x.shape[:1], dtype=torch.float32)
    if launch is not None:
        launch(x, out, scale)
    return out, scale


def _known(make: Callable[[Tensor], Plan], x: Tensor) -> Plan:
    """What the key says is checked when a plan is made."""
    return plan((make, x.shape, x.stride(), x.dtype, x.get_device()), lambda: make(x))


def _rows_plan(x: Tensor) -> Plan:
    m, k = _check(x)
    if m == 0 or k == 0:
        return Plan((m, k), None)
    block = triton.next_power_of_2(k)
    warps = max(1, min(16, block // 1024))
    constants = (block, block == k)
    return Plan((m, k), Launch(_rows_kernel, (m, 1, 1), (k, x.stride(0)), constants, {"num_warps": warps}, x.device))


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: bf16 or fp16 [M, K], K a multiple of 128 -> (e4m3 [R, K], fp32 [R, K / 128] with strides (1, R)), 128 columns a scale.

    R is M, or the next multiple of 4, which the product wants of the scales; rows past M are zeros.
    Raises ValueError for another dtype or K.
    """
    launch = _known(_groups_plan, x).launch
    m, k = x.shape
    rows = -(-m // _SCALE_ROWS) * _SCALE_ROWS
    out = x.new_empty((rows, k), dtype=E4M3)
    scale = x.new_empty((k // GROUP, rows), dtype=torch.float32)
    if launch is not None:
        launch(x, out, scale)
    return out, scale.t()


def _groups_plan(x: Tensor) -> Plan:
    m, k = _check(x)
    if k % GROUP:
        raise ValueError(f"x: expected K a multiple of {GROUP}, found {k}")
    if m == 0 or k == 0:
        return Plan((m, k), None)
    block_m, block_g = 16, 2
    rows = -(-m // _SCALE_ROWS) * _SCALE_ROWS
    grid = (-(-rows // block_m), -(-k // (block_g * GROUP)), 1)
    return Plan(
        (rows, k), Launch(_groups_kernel, grid, (m, rows, k, x.stride(0)), (block_m, block_g), {"num_warps": 4}, x.device)
    )


def row_twin(weight: Tensor | KernelWeight, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], fp32 [N]) of a dense weight [N, K] or of an int4 one, by way of some dense rows at a time.

    out: e4m3 [N, K] to write into. Act-order weights come out in checkpoint order.
    """
    if isinstance(weight, Tensor):
        return quantize_rows(weight, out)
    n, k = weight.n, weight.k
    out = torch.empty((n, k), dtype=E4M3, device=weight.packed.device) if out is None else out
    scales = torch.empty(n, dtype=torch.float32, device=out.device)
    rows = max(1, min(n, TILE_BYTES // (2 * k)))
    dense = torch.empty((rows, k), dtype=weight.scales.dtype, device=out.device)
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        part = dense[: stop - start]
        expand(weight.packed, weight.scales, weight.zeros, weight.perm, part, group_size=weight.group_size, rows=(start, stop))
        scales[start:stop] = quantize_rows(part, out[start:stop])[1]
    return out, scales


def exact_twin(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K] of q - zero, fp32 [N, K / 128] with strides (1, N)) of an int4 weight in the kernels' order.

    The columns of a group, a multiple of 128, lie side by side (no act-order). out: e4m3 [N, K] to write into.
    Raises UnsupportedError for other groups, whose scales are finer than the product takes.
    """
    n, groups = scales.shape
    k = groups * group_size
    if group_size % GROUP:
        expected = f"groups of a multiple of {GROUP} columns for an exact fp8 twin"
        raise UnsupportedError(expected=expected, found=f"groups of {group_size}")
    check_weight(packed, scales, zeros, group_size=group_size, k=k)
    out = torch.empty((n, k), dtype=E4M3, device=packed.device) if out is None else out
    wide = scales.float().repeat_interleave(group_size // GROUP, dim=1).t().contiguous().t()
    constants = (group_size if groups > 1 else 0, zeros is not None, _GRID_ROWS)
    grid = (k // GROUP * -(-n // _GRID_ROWS), 1, 1)
    if n:
        Launch(_grid_kernel, grid, (n, k, packed.shape[1], groups), constants, {"num_warps": 4}, out.device)(packed, zeros, out)
    return out, wide


def turned(data: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A twin as products take it, views: data [K, N], scales [1, N] or [K / 128, N]."""
    return data.t(), scales.unsqueeze(0) if scales.dim() == 1 else scales.t()


def row_linear(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x: bf16 or fp16 [M, K] -> [M, N] of x's dtype on a `row_twin`. K and N are multiples of 16. Both sides are rounded."""
    quantized, scale = quantize_rows(x)
    return _finish(_row_product(quantized, scale.unsqueeze(1), *turned(data, scales), _row_dtype(x)), bias, x.dtype)


def exact_linear(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x: bf16 or fp16 [M, K] -> [M, N] of x's dtype on an `exact_twin`. N is a multiple of 16. Only x is rounded."""
    quantized, scale = quantize_groups(x)
    return _finish(_exact_product(quantized, scale, *turned(data, scales))[: x.shape[0]], bias, x.dtype)


Again = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, and a twin as `turned`) -> y."""


def row_again(x: Tensor) -> Again | None:
    """`row_linear` without a bias for other x of exactly this size, contiguous and aligned to 16 bytes: it looks at nothing.
    None for an empty x.
    """
    dtype = _row_dtype(x)
    return _again(_known(_rows_plan, x), x, (x.shape[0], 1), lambda q, a, twin, b: _row_product(q, a, twin, b, dtype))


def exact_again(x: Tensor) -> Again | None:
    """As `row_again`, of `exact_linear`; None also where rows are padded."""
    scales = x.shape[1] // GROUP, x.shape[0]
    return _again(_known(_groups_plan, x), x, scales, lambda q, a, twin, b: _exact_product(q, a.t(), twin, b))


def _again(made: Plan, x: Tensor, scales_shape: tuple[int, int], product: Callable[..., Tensor]) -> Again | None:
    launch, shape = made.launch, made.out_shape
    if launch is None or shape != x.shape:
        return None

    def again(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
        quantized, scale = x.new_empty(shape, dtype=E4M3), x.new_empty(scales_shape, dtype=torch.float32)
        launch(x, quantized, scale)
        return _finish(product(quantized, scale, data, scales), None, x.dtype)

    return again


def _row_product(x: Tensor, x_scale: Tensor, data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(x, data, scale_a=x_scale, scale_b=scales, out_dtype=dtype, use_fast_accum=True)


def _exact_product(x: Tensor, x_scale: Tensor, data: Tensor, scales: Tensor) -> Tensor:
    return torch._scaled_mm(x, data, x_scale, scales, out_dtype=torch.bfloat16)


def _row_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.bfloat16 or _gives_fp16(x.device) else torch.bfloat16


@cache
def _gives_fp16(device: torch.device) -> bool:
    """Whether row-wise products come in fp16 too: by cuBLAS on Hopper (seen in torch 2.11 with CUDA 13), not by torch's own."""
    cuda = torch.version.cuda
    return torch.cuda.get_device_capability(device) == (9, 0) and cuda is not None and int(cuda.split(".")[0]) >= 13


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        y += bias
    return y if y.dtype == dtype else y.to(dtype)


def _check(x: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or x.dtype not in FLOAT_TYPES or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x: expected bf16 or fp16 [M, K] with contiguous rows, found {x.dtype} {list(x.shape)}, {x.stride()}")
    return x.shape[0], x.shape[1]
