"""What a twin holds: exactly what the inner kernel computes, whatever layout it keeps its weight in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twinweight.engines.vllm.layout import CpuLayout
from twinweight.kernels import backend_for

if TYPE_CHECKING:
    from twinweight.engines.vllm.kernel import TwinLinearKernel

_ROWS = 512  # identity rows a call: large enough for a GPU, 24 MiB of them at K = 24576
_CHECKED = 8  # identity rows that check an unpacked twin, spread over K
_UNPACKED = 1 << 22  # weights expanded at a time: 40 MiB of temporaries


def transient_bytes(n: int, k: int) -> int:
    """Peak of temporaries while a twin [n, k] is filled: identity rows and their product, or a part unpacked."""
    return max(_ROWS * (n + k) * 2, _UNPACKED * 10)


def allocate(kernel: TwinLinearKernel, dtype: torch.dtype) -> None:
    """An uninitialised twin and bias, rows padded where the device needs it. Charge `transient_bytes` besides."""
    device = kernel.device
    kernel.twin = backend_for(device).empty_twin(kernel.n, kernel.k, dtype, device)
    if getattr(kernel.layer, "bias", None) is not None:
        kernel.twin_bias = torch.empty(kernel.n, dtype=kernel.dtype, device=device)
    kernel.fresh = False


@torch.inference_mode()
def fill(kernel: TwinLinearKernel) -> None:
    """Write the twin and its bias in place from the layer's current weights."""
    twin = kernel.twin
    if twin is None:
        return
    if not _unpack_cpu(kernel, twin) or not is_exact(kernel):
        _fill_by_identity(kernel, twin)
    if kernel.twin_bias is not None:
        zero = torch.zeros(1, kernel.k, dtype=kernel.dtype, device=twin.device)
        kernel.twin_bias.copy_(kernel.inner_linear(zero, kernel.layer.bias)[0])
    kernel.fresh = True


def dense(kernel: TwinLinearKernel) -> Tensor:
    """The weight as the inner kernel sees it, [N, K] in the activation dtype: a temporary."""
    out = torch.empty(kernel.n, kernel.k, dtype=kernel.dtype, device=kernel.device)
    _fill_by_identity(kernel, out)
    return out


def _fill_by_identity(kernel: TwinLinearKernel, out: Tensor) -> None:
    for start in range(0, kernel.k, _ROWS):
        columns = range(start, min(start + _ROWS, kernel.k))
        out[:, columns.start : columns.stop].copy_(_columns(kernel, columns).t())


@torch.inference_mode()
def is_exact(kernel: TwinLinearKernel) -> bool:
    """Whether some identity rows through the inner kernel are columns of the twin, bit for bit."""
    if kernel.twin is None:
        return False
    step = max(1, kernel.k // _CHECKED)
    columns = range(step // 2, kernel.k, step)
    expected = _columns(kernel, columns).t().to(kernel.twin.dtype)
    return torch.equal(kernel.twin[:, columns.start :: step][:, : len(columns)], expected)


def _columns(kernel: TwinLinearKernel, columns: range) -> Tensor:
    """Columns of the weight as the inner kernel sees it: [len(columns), N], in the activation dtype."""
    device = kernel.device
    at = torch.arange(columns.start, columns.stop, columns.step, device=device)
    eye = torch.zeros(len(columns), kernel.k, dtype=kernel.dtype, device=device)
    eye.scatter_(1, at[:, None], 1)
    return kernel.inner_linear(eye, None)


def _unpack_cpu(kernel: TwinLinearKernel, twin: Tensor) -> bool:
    """Expand the layout of vLLM's CPU kernel, several times as fast as the identity; False where the layout is another."""
    layout = CpuLayout.of(kernel)
    if layout is None:
        return False
    step = max(16, _UNPACKED // kernel.k // 16 * 16)
    for start in range(0, kernel.n, step):
        stop = min(start + step, kernel.n)
        twin[start:stop].view(-1, 16, kernel.k).copy_(layout.rows(start, stop).dense(kernel.dtype).transpose(1, 2))
    return True
