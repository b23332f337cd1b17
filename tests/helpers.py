"""What tests share: one tolerance, one source of random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight.weight import Int4Weight, from_values


def assert_close(actual: Tensor, reference: Tensor, max_err: float = 2e-2, rms_err: float = 4e-3) -> None:
    """actual against a float64 reference: largest error over the largest value, rms error over the rms."""
    assert actual.shape == reference.shape, f"shape {list(actual.shape)}, expected {list(reference.shape)}"
    if reference.numel() == 0:
        return
    error = actual.double() - reference.double()
    assert bool(torch.isfinite(error).all()), "NaN or infinity"
    tiny = torch.finfo(torch.float64).tiny
    largest = float(error.abs().max() / reference.double().abs().max().clamp_min(tiny))
    rms = float(error.square().mean().sqrt() / reference.double().square().mean().sqrt().clamp_min(tiny))
    assert largest <= max_err, f"normalised max error {largest:.3e} > {max_err:.0e} (rms {rms:.3e})"
    assert rms <= rms_err, f"normalised rms error {rms:.3e} > {rms_err:.0e} (max {largest:.3e})"


def random_weight(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = True,
    act_order: bool = False,
    seed: int = 0,
) -> Int4Weight:
    """A random int4 weight [n, k] on the CPU, entries of order 1 / sqrt(k). group_size: divides k; k for per channel."""
    generator = torch.Generator().manual_seed(seed)
    groups = k // group_size
    values = torch.randint(0, 16, (n, k), generator=generator)
    scales = ((0.5 + torch.rand(n, groups, generator=generator)) / (5 * k**0.5)).to(dtype)
    zeros = None if symmetric else torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    g_idx = (torch.randperm(k, generator=generator) // group_size).to(torch.int32) if act_order else None
    return from_values(values, scales, zeros, g_idx, group_size=group_size)
