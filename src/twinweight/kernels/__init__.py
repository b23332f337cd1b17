"""The paths themselves, one backend for the CPU (ATen) and one for GPUs (Triton)."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from twinweight.kernels import pages
from twinweight.kernels.prepared import Again, KernelWeight
from twinweight.paths import Path
from twinweight.weight import Int4Weight


class Backend(Protocol):
    """What a device offers. Every function is pure, but for `expand`, which writes `out`."""

    def begin(self, device: torch.device) -> None:
        """Called first: load in the background what calls on the device will need."""

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

    def again(self, path: int, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Again | None:
        """`int4_linear` or `fused_linear`, as path says, with all that follows from the sizes worked out: for other x [..., K]
        of the size and dtype of this one, contiguous and aligned to 16 bytes, and weights and biases like these. It looks at
        nothing. None where that cannot be, and for other paths.
        """

    def expand(self, w: KernelWeight, out: Tensor) -> None:
        """The dense weight into out [N, K]."""

    def expand_rows(self, w: KernelWeight, first: int, last: int, out: Tensor) -> None:
        """The dense output features first to last, first a multiple of 64, into out [last - first, K]."""

    def stream_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of dense rows that live for one product with activations of `dtype`."""

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
    return _backend("cpu" if device.type == "cpu" else "gpu")


@functools.cache
def _backend(kind: str) -> Backend:
    if kind == "cpu":
        import twinweight.kernels.cpu as cpu

        return cpu
    import twinweight.kernels.gpu as gpu

    return gpu


def int4_path(path: int, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N] by a path that needs no twin. Raises ValueError for another."""
    backend = _backend("cpu" if x.is_cpu else "gpu")
    if path == Path.INT4:
        return backend.int4_linear(x, w, bias)
    if path == Path.FUSED:
        return backend.fused_linear(x, w, bias)
    if path == Path.STREAM:
        from twinweight.kernels.stream import stream_linear

        return stream_linear(backend, x, w, bias)
    raise ValueError(f"path is {path!r}, expected int4, fused or stream")


def dense_linear(x: Tensor, twin: Tensor, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N] on a dense weight [N, K], which may be of a wider dtype than x."""
    if twin.dtype == x.dtype:
        return _dense(x, twin, bias) if x.is_cpu else torch.nn.functional.linear(x, twin, bias)
    wide_bias = bias.to(twin.dtype) if bias is not None else None
    return dense_linear(x.to(twin.dtype), twin, wide_bias).to(x.dtype)


def _dense(x: Tensor, twin: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` on a CPU; a large result goes into huge pages, unless autograd wants to know of it."""
    if torch.is_grad_enabled():
        return torch.nn.functional.linear(x, twin, bias)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] * twin.shape[0] * x.itemsize < pages.LARGE:
        return torch.nn.functional.linear(x, twin, bias)
    y = pages.empty(rows.shape[0], twin.shape[0], dtype=x.dtype)
    if bias is None:
        torch.mm(rows, twin.t(), out=y)
    else:
        torch.addmm(bias, rows, twin.t(), out=y)
    return y.view(*x.shape[:-1], twin.shape[0])
