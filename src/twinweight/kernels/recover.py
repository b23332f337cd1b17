"""`twinweight.recover` on GPUs: a pass over the dense weight, where torch's operations take some fifty and wait for each."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton kernels carry no types; every other function here does.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device, traits_of
from .launch import FUSING
from .unpack import round_to

_VALUES = 2048
"""That a program works on, or one group."""


@triton.jit
def _multiples(values, scale, NATIVE: tl.constexpr):
    """The nearest multiples of scales [R] to values [R, C], and the rows all of which they give back exactly."""
    step = tl.where(scale.to(tl.float32) > 0, scale.to(tl.float32), 1.0)[:, None]
    d = tl.floor(values.to(tl.float32) / step + 0.5)
    # In fp32, as a NaN of 16 bits equals itself in Triton's interpreter.
    back = round_to(d * step, values.dtype, NATIVE, False).to(tl.float32) == values.to(tl.float32)
    return d, (tl.min(back.to(tl.int32), 1) != 0) & (scale.to(tl.float32) > 0)


@triton.jit
def _read_back_kernel(
    values_ptr, likely_ptr, steps_ptr, scales_ptr, found_ptr, groups, tried,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """ROWS groups; likely_ptr: fp32 [tried], tried in turn until all of them are found."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    at = rows.to(tl.int64)[:, None] * GROUP + columns[None, :]
    inside = (rows < groups)[:, None] & (columns < GROUP)[None, :]
    values = tl.load(values_ptr + at, mask=inside, other=0.0)
    largest = tl.max(tl.abs(values.to(tl.float32)), 1)
    found = tl.max((values.to(tl.float32) != 0).to(tl.int32), 1) == 0  # what is no number is not 0
    scale = tl.full((ROWS,), 1.0, tl.float32).to(values.dtype)
    steps = tl.zeros((ROWS, COLUMNS), tl.int8)
    count = 0
    while (count < 3 * tried) & (tl.min(found.to(tl.int32), 0) == 0):
        j = tl.load(likely_ptr + count // 3)
        middle = round_to(tl.div_rn(largest, tl.zeros_like(largest) + j), values.dtype, NATIVE, False)
        # its neighbours among 16-bit numbers: one up, one down
        aside = tl.maximum(middle.to(tl.int16, bitcast=True) + tl.where(count % 3 == 1, 1, -1), 0).to(tl.int16)
        tried_scale = tl.where(count % 3 == 0, middle, aside.to(values.dtype, bitcast=True))
        d, fits = _multiples(values, tried_scale, NATIVE)
        low, high = tl.min(d, 1), tl.max(d, 1)
        new = fits & (found == 0) & (high - tl.minimum(low, 0.0) <= STEPS) & (low >= -STEPS)
        scale = tl.where(new, tried_scale, scale)
        steps = tl.where(new[:, None], d.to(tl.int8), steps)
        found = found | new
        count += 1
    tl.store(steps_ptr + at, steps, mask=inside)
    tl.store(scales_ptr + rows, scale, mask=rows < groups)
    tl.store(found_ptr + rows, found.to(tl.int8), mask=rows < groups)


def recover_groups(values: Tensor, steps: Tensor, scales: Tensor, likely: Sequence[int], most: int) -> Tensor:
    """Fill steps [R, g], int8, and scales [R] where a group has a form (`twinweight.recover`); returns where, int8 [R].

    values: bf16 or fp16 [R, g], contiguous. likely: what |q - z| of the largest magnitude of a group may be, the likely ones
    first. most: the largest |q - z|, also as a difference within a group.
    """
    groups, group = values.shape
    columns = triton.next_power_of_2(group)
    rows = max(1, _VALUES // columns)
    found = torch.empty(groups, dtype=torch.int8, device=values.device)
    table = torch.tensor(likely, dtype=torch.float32, device=values.device)
    constants = (group, columns, rows, most, traits_of(values.device).rounds_bf16)
    with on_device(values):
        _read_back_kernel[(triton.cdiv(groups, rows),)](
            values, table, steps, scales, found, groups, len(likely), *constants, num_warps=max(4, min(16, columns // 1024)),
            **FUSING,
        )  # fmt: skip
    return found
