"""The int8 twin of a CPU: oneDNN's int8 product behind `torch._int_mm`, activations rounded to int8 as they come.

A weight has one scale a row (largest value / 127), an activation one a token, found anew in every call. Both are signed and
symmetric: oneDNN moves one of them to unsigned and takes that back, and the product is exact in int32.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from twinweight.kernels import pages

MAX_K = (1 << 31) // (127 * 127)
"""Input features beyond which a sum could leave int32."""

_TOP = 127
_TINY = 1e-30  # what a row of zeros counts as
_QUANTIZED = 1 << 21  # activations rounded at a time: their fp32 copy stays in the caches
_PRODUCTS = 1 << 20  # int32 products held at a time: 4 MiB, which stay in the caches until they are scaled
_ROWS = 2048  # most rows of a tile: oneDNN reorders the weight for every one


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this CPU multiplies int8 in one instruction (VNNI, AMX) and torch's product is exact there.

    Without it oneDNN adds pairs of products in 16 bits, which saturate, or falls back to a loop that takes minutes.
    """
    if not torch.backends.mkldnn.is_available() or not _has_instruction():  # type: ignore[no-untyped-call]
        return False
    full = torch.full((64, 256), _TOP, dtype=torch.int8)
    return bool((torch._int_mm(full, full.t()) == 256 * _TOP * _TOP).all())


def _has_instruction() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(flags)


def quantize_weight(dense: Tensor) -> tuple[Tensor, Tensor]:
    """dense: [N, K] of any float dtype -> int8 [N, K], fp32 scale [N]; a value is data * scale, off by half a scale at most."""
    data = torch.empty(dense.shape, dtype=torch.int8)
    return data, _quantize(dense.to(torch.float32, copy=True), data)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [M, K] -> int8 [M, K], fp32 scale [M]. A row with a NaN or an infinity has a scale that is none."""
    m, k = x.shape
    data, scales = pages.empty(m, k, dtype=torch.int8), torch.empty(m, dtype=torch.float32)
    step = max(1, _QUANTIZED // max(1, k))
    wide = pages.empty(min(m, step), k, dtype=torch.float32)
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        scales[part] = _quantize(wide[: part.stop - start].copy_(x[part]), data[part])
    return data, scales


def _quantize(values: Tensor, out: Tensor) -> Tensor:
    """values: fp32 [rows, K], which is overwritten; out: int8 [rows, K] -> scale [rows]. Few calls: each has a barrier."""
    largest = torch.maximum(values.amax(1), values.amin(1).neg_()).clamp_(min=_TINY)
    out.copy_(values.mul_((_TOP / largest).unsqueeze(1)).round_())
    return largest.div_(_TOP)


def linear(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N] in the dtype of x, on data int8 [N, K] with scales fp32 [N]. Rounds once, after the bias."""
    quantized, tokens = quantize_rows(x)
    return multiply(quantized, tokens, data, scales, bias, x.dtype)


def multiply(
    quantized: Tensor, tokens: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 [M, K] with scales fp32 [M], times int8 [N, K] with scales fp32 [N] -> [M, N] of `dtype`."""
    m, n = quantized.shape[0], data.shape[0]
    tokens, wide_bias = tokens.unsqueeze(1), bias.float() if bias is not None else None
    y = pages.empty(m, n, dtype=dtype)
    rows = max(1, min(m, _ROWS))
    columns = min(n, max(64, _PRODUCTS // rows // 64 * 64))
    scratch = pages.empty(rows * columns, dtype=torch.int32)
    for top in range(0, m, rows):
        some = slice(top, min(top + rows, m))
        for left in range(0, n, columns):
            part = slice(left, min(left + columns, n))
            sums = scratch[: (some.stop - top) * (part.stop - left)].view(some.stop - top, -1)
            torch._int_mm(quantized[some], data[part].t(), out=sums)
            out = sums.view(torch.float32)
            out.copy_(sums)  # in place: both have 32 bits
            out.mul_(scales[part])
            if wide_bias is None:
                out.mul_(tokens[some])
            else:
                torch.addcmul(wide_bias[part], out, tokens[some], out=out)
            y[some, part] = out
    return y
