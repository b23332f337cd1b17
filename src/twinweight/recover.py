"""The int4 weight behind a dense one: what a kernel with an unknown layout computes under the identity, as integers again."""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight.weight import SYMMETRIC_ZERO, Int4Weight, pack_nibbles

_STEPS = 15  # |q - zero| of 4-bit values
_LIKELY = (7, 8, 15, *range(14, 8, -1), *range(6, 0, -1))
"""What the largest |q - zero| of a group may be, the likely ones first: each that is tried costs a pass over the open groups.
7 before 8, which would ask for zero points where a group holds nothing but zeros and sevens.
"""

_FIRST = 16
"""Values of a group that are tried first: a wrong scale fails on these."""

_VALUES = 1 << 21
"""Values worked on at a time on a CPU: 30 MiB of temporaries."""


def recover(dense: Tensor, group_size: int) -> Int4Weight | None:
    """An `Int4Weight` whose dequantized values are `dense`, bit for bit; None where a group has no such form.

    dense: bf16 or fp16 [N, K], K a multiple of group_size. Each group's values are round((q - z) * s) with a 16-bit s. Its
    largest magnitude is j * s for some j up to 15, so j of every candidate is tried, with the neighbours of a rounded quotient.
    Only q - z matters: z is 8 where that suffices for a whole weight, with the signs of scales as it needs them.
    """
    n, k = dense.shape
    if k % group_size:
        raise ValueError(f"group_size is {group_size}, expected a divisor of K = {k}")
    groups = dense.reshape(-1, group_size).contiguous()
    steps = torch.empty(groups.shape, dtype=torch.int8, device=dense.device)
    scales = torch.empty(groups.shape[0], dtype=dense.dtype, device=dense.device)
    if not _recover_all(groups, steps, scales):
        return None
    low, high = steps.amin(1), steps.amax(1)
    shape = (n, k // group_size)
    above = high == SYMMETRIC_ZERO  # as with the scale's sign turned: some quantizers write negative ones
    if bool(((low >= -SYMMETRIC_ZERO) & (high < SYMMETRIC_ZERO) | above & (low > -SYMMETRIC_ZERO)).all()):
        zeros = None
        shift: Tensor | int = SYMMETRIC_ZERO
        sign = 1 - 2 * above.to(torch.int8)
        steps *= sign[:, None]
        scales *= sign
    else:
        # Near 8, so that padded or symmetric groups look as a quantizer would have written them.
        z = torch.minimum(torch.maximum(-low, torch.full_like(low, SYMMETRIC_ZERO)), 15 - high)
        if bool((z + low < 0).any()) or bool((z < 0).any()) or bool((z > 15).any()):
            return None
        zeros = z.to(torch.uint8).view(shape)
        shift = z[:, None]
    values = (steps + shift).to(torch.uint8).view(n, k)
    return Int4Weight(pack_nibbles(values), scales.view(shape), zeros, None, group_size, k)


def _recover_all(groups: Tensor, steps: Tensor, scales: Tensor) -> bool:
    """Fill steps [R, g] and scales [R]; False where a group has no form. A GPU reads the groups once and waits once."""
    if groups.device.type != "cpu":
        from twinweight.kernels.recover import recover_groups

        return bool(recover_groups(groups, steps, scales, _LIKELY, _STEPS).all())
    at_once = max(1, _VALUES // groups.shape[1])
    parts = [slice(at, at + at_once) for at in range(0, groups.shape[0], at_once)]
    return all(_recover_groups(groups[part], steps[part], scales[part]) for part in parts)


def _recover_groups(v: Tensor, steps: Tensor, scales: Tensor) -> bool:
    """Fill steps [R, g] and scales [R] of some groups; False where one is not found."""
    largest = v.abs().amax(1).float()
    scales.fill_(1)
    steps.zero_()
    open_ = largest != 0
    for j in _LIKELY:
        middle = (largest / j).to(v.dtype)
        for s in (middle, _neighbour(middle, 1), _neighbour(middle, -1)):
            at = open_.nonzero().squeeze(1)
            if not len(at):
                return True
            at = at[_multiples(v[at, :_FIRST], s[at])[1]]
            d, fits = _multiples(v[at], s[at])
            fits &= (d.amax(1) - d.amin(1).clamp(max=0)).le(_STEPS) & d.amin(1).ge(-_STEPS)
            found = at[fits]
            steps[found] = d[fits].to(torch.int8)
            scales[found] = s[found]
            open_[found] = False
    return not bool(open_.any())


def _multiples(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest multiples of s [R] to v [R, g], in fp32, and the rows all of which s gives back exactly."""
    step = s.float()[:, None]
    d = (v / step).round_()
    return d, ((d * step).to(v.dtype) == v).all(1) & (s > 0)


def _neighbour(s: Tensor, step: int) -> Tensor:
    """The next 16-bit value of a positive tensor, up or down."""
    return (s.view(torch.int16) + step).clamp_(min=0).view(s.dtype)
