"""The last step of a product whose K was split over programs: add the parts, in a fixed order, and round once."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import traits_of
from .unpack import round_to


@triton.jit
def _sum_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    N,
    stride_out,
    stride_split,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < N
    parts_ptr += row * N
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(parts_ptr + part * stride_split + offs, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    result = round_to(total, out_ptr.dtype.element_ty, NATIVE, False)
    tl.store(out_ptr + row * stride_out + offs, result, mask=inside)


def sum_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = bias + the sum over parts, contiguous fp32 [S, M, N]; the same sum on every run (no atomics)."""
    split, m, n = parts.shape
    block = 512
    _sum_kernel[(m, -(-n // block))](
        parts, bias, out, n, out.stride(0), parts.stride(0), HAS_BIAS=bias is not None, SPLIT_K=split, BLOCK=block,
        NATIVE=traits_of(out.device).rounds_bf16, num_warps=4,
    )  # fmt: skip
