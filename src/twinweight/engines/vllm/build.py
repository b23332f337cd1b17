"""What a twin holds: exactly what the inner kernel computes, whatever layout it keeps its weight in."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    device = next(kernel.layer.parameters()).device
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
        for start in range(0, kernel.k, _ROWS):
            columns = range(start, min(start + _ROWS, kernel.k))
            twin[:, columns.start : columns.stop].copy_(_columns(kernel, columns).t())
    if kernel.twin_bias is not None:
        zero = torch.zeros(1, kernel.k, dtype=kernel.dtype, device=twin.device)
        kernel.twin_bias.copy_(kernel.inner_linear(zero, kernel.layer.bias)[0])
    kernel.fresh = True


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
    device = next(kernel.layer.parameters()).device
    at = torch.arange(columns.start, columns.stop, columns.step, device=device)
    eye = torch.zeros(len(columns), kernel.k, dtype=kernel.dtype, device=device)
    eye.scatter_(1, at[:, None], 1)
    return kernel.inner_linear(eye, None)


@dataclass(frozen=True)
class _CpuLayout:
    """The tensors of vLLM's CPU kernel: words [N/16, 2K] int32, blocks of 16 outputs with 8 bytes for each k, low nibble first;
    scales [K/G, N]; zeros [K/G, N/8] int32, or None for 8.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    @staticmethod
    def of(kernel: TwinLinearKernel) -> _CpuLayout | None:
        """None where the inner kernel is another, or keeps another layout (int8 activations)."""
        inner, n, k = kernel.inner, kernel.n, kernel.k
        if type(inner).__name__ != "CPUWNA16LinearKernel" or getattr(kernel.layer, "use_w4a8", True):
            return None
        words, scales, zeros = inner._get_weight_params(kernel.layer)
        known = words.shape == (n // 16, 2 * k) and scales.shape[1] == n and k % scales.shape[0] == 0
        return _CpuLayout(words, scales, zeros) if known and inner.config.weight_type.size_bits == 4 else None

    def rows(self, start: int, stop: int) -> _CpuLayout:
        """Output features start to stop, multiples of 16."""
        zeros = self.zeros[:, start // 8 : stop // 8].contiguous() if self.zeros is not None else None
        return _CpuLayout(self.words[start // 16 : stop // 16], self.scales[:, start:stop].contiguous(), zeros)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N/16, K, 16]. The kernel rounds (q - z) * s to the activation dtype before its GEMM, and so must a wider twin."""
        blocks, groups = self.words.shape[0], self.scales.shape[0]
        q = _nibbles(self.words).view(blocks, groups, -1, 16).float()
        z = 8 if self.zeros is None else _nibbles(self.zeros).view(groups, blocks, 1, 16).transpose(0, 1)
        s = self.scales.view(groups, blocks, 1, 16).transpose(0, 1).float()
        return q.sub_(z).mul_(s).to(dtype).view(blocks, -1, 16)


def _nibbles(words: Tensor) -> Tensor:
    data = words.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), -1)


def _unpack_cpu(kernel: TwinLinearKernel, twin: Tensor) -> bool:
    """Expand the layout of vLLM's CPU kernel, several times as fast as the identity; False where the layout is another."""
    layout = _CpuLayout.of(kernel)
    if layout is None:
        return False
    step = max(16, _UNPACKED // kernel.k // 16 * 16)
    for start in range(0, kernel.n, step):
        stop = min(start + step, kernel.n)
        twin[start:stop].view(-1, 16, kernel.k).copy_(layout.rows(start, stop).dense(kernel.dtype).transpose(1, 2))
    return True


def slice_of(kernel: TwinLinearKernel, n: int) -> Any:
    """A stand-in for the layer with its first n outputs, n a multiple of 32, to time; None where the layout is not known."""
    layout = _CpuLayout.of(kernel)
    if layout is None:
        return None
    part, inner = layout.rows(0, n), kernel.inner
    names: dict[str, Tensor | None] = {inner.w_q_name: part.words, inner.w_s_name: part.scales}
    if inner.w_zp_name:
        names[inner.w_zp_name] = part.zeros
    return SimpleNamespace(use_w4a8=False, isa_hint=kernel.layer.isa_hint, **names)
