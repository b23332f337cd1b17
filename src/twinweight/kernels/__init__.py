"""The paths themselves, one backend for the CPU (ATen) and one for GPUs (Triton)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from twinweight.kernels.prepared import KernelWeight
from twinweight.weight import Int4Weight


class Backend(Protocol):
    """What a device offers. Every function is pure, but for `expand`, which writes `out`."""

    def prepare(self, weight: Int4Weight) -> KernelWeight:
        """Into the device's layout; the weight's tensors are already on the device."""

    def unprepare(self, w: KernelWeight, *, symmetric: bool, group_size: int) -> Int4Weight:
        """The inverse of `prepare`."""

    def weight_bytes(self, n: int, k: int, group_size: int, act_order: bool, symmetric: bool) -> int:
        """Bytes of what `prepare` returns for such a weight, without preparing it."""

    def int4_linear(self, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
        """[M, K] -> [M, N], for few rows."""

    def fused_linear(self, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
        """[M, K] -> [M, N], int4 unpacked inside the GEMM."""

    def expand(self, w: KernelWeight, out: Tensor) -> None:
        """The dense weight into out [N, K]."""

    def twin_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Dtypes in which an exact twin for activations of `dtype` may be worth its bytes."""

    def paths_without_twin(self) -> tuple[int, ...]:
        """The distinct paths that need no twin."""

    def empty_twin(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised twin [N, K], rows padded where the device needs it."""

    def twin_bytes(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of `empty_twin`."""


def backend_for(device: torch.device) -> Backend:
    """The backend of a device: ATen on "cpu", Triton on everything else."""
    if device.type == "cpu":
        import twinweight.kernels.cpu as cpu

        return cpu
    import twinweight.kernels.gpu as gpu

    return gpu


def dense_linear(x: Tensor, twin: Tensor, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N] on a dense weight [N, K], which may be of a wider dtype than x."""
    if twin.dtype == x.dtype:
        return torch.nn.functional.linear(x, twin, bias)
    wide_bias = bias.to(twin.dtype) if bias is not None else None
    return torch.nn.functional.linear(x.to(twin.dtype), twin, wide_bias).to(x.dtype)
