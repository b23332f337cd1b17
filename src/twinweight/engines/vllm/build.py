"""What a twin holds: exactly what the inner kernel computes, whatever layout it keeps its weight in."""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight import twin as twins
from twinweight.engines.vllm import identity, offers, own
from twinweight.engines.vllm.layout import CpuLayout
from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.kernels.prepared import KernelWeight

_CHECKED = 8  # identity rows that check an unpacked twin, spread over K
_UNPACKED = 1 << 22  # weights expanded at a time: 40 MiB of temporaries


class Unreadable(RuntimeError):
    """An 8-bit twin cannot be made of what the inner kernel computes."""


def transient_bytes(n: int, k: int, *, lossy: bool = False) -> int:
    """Peak of temporaries while a twin [n, k] is filled: identity rows and their product, or a part unpacked; for an 8-bit one
    the dense weight besides, and its integers one a byte, twice, and packed.
    """
    return max(identity.ROWS * (n + k) * 2, _UNPACKED * 10) + (9 * n * k // 2 if lossy else 0)


def allocate(kernel: Wrapped, form: str) -> bool:
    """What a form has, uninitialised: a twin, the bias, an own copy. Charge `transient_bytes` besides. True."""
    device, kind = kernel.device, offers.twin_of(form)
    if kind is not None:
        kernel.twin, kernel.twin_scales = twins.empty(kind, kernel.n, kernel.k, device)
        if device.type != "cpu":
            kernel.twin_t, kernel.scales_t = twins.turned(kernel.twin, kernel.twin_scales)
    if getattr(kernel.layer, "bias", None) is not None:
        kernel.bias = torch.empty(kernel.n, dtype=kernel.dtype, device=device)
    kernel.fresh = False
    if offers.has_copy(form):
        own.allocate(kernel)
    return True


def copy(kernel: Wrapped, form: str) -> bool:
    """Write the own copy, where the form has one. False where there can be none, which the kernel keeps in mind."""
    if not offers.has_copy(form):
        return True
    kernel.copyable = own.fill(kernel)
    return kernel.copyable


@torch.inference_mode()
def fill(kernel: Wrapped) -> None:
    """Write the twin and the bias, those that there are, in place from the layer's current weights. Raises Unreadable where
    an 8-bit twin cannot be made of them.
    """
    twin = kernel.twin
    if twin is not None and kernel.twin_scales is not None:
        twins.fill(_source(kernel, twins.kind_of(twin, kernel.twin_scales)), twin, kernel.twin_scales)
    elif twin is not None and (not _unpack_cpu(kernel, twin) or not is_exact(kernel)):
        identity.fill(kernel, twin)
    if kernel.bias is not None:
        zero = torch.zeros(1, kernel.k, dtype=kernel.dtype, device=kernel.device)
        kernel.bias.copy_(kernel.inner_linear(zero, kernel.layer.bias)[0])
    kernel.fresh = True


def _source(kernel: Wrapped, kind: str) -> KernelWeight | Tensor:
    """What an 8-bit twin is made from: an own copy, else the dense weight where that will do, else integers read back."""
    if kernel.own is not None:
        return kernel.own
    if kind in twins.FROM_DENSE:
        return identity.dense(kernel)
    weight = own.make(kernel, exact=False)
    if weight is None:
        raise Unreadable(f"the int4 weight behind {type(kernel.inner).__name__} cannot be read back")
    return weight


@torch.inference_mode()
def is_exact(kernel: Wrapped) -> bool:
    """Whether some identity rows through the inner kernel are columns of the twin, bit for bit."""
    if kernel.twin is None or kernel.twin_scales is not None:
        return False
    step = max(1, kernel.k // _CHECKED)
    columns = range(step // 2, kernel.k, step)
    expected = identity.columns(kernel, columns).t().to(kernel.twin.dtype)
    return torch.equal(kernel.twin[:, columns.start :: step][:, : len(columns)], expected)


def _unpack_cpu(kernel: Wrapped, twin: Tensor) -> bool:
    """Expand the layout of vLLM's CPU kernel, several times as fast as the identity; False where the layout is another."""
    layout = CpuLayout.of(kernel)
    if layout is None:
        return False
    step = max(16, _UNPACKED // kernel.k // 16 * 16)
    for start in range(0, kernel.n, step):
        stop = min(start + step, kernel.n)
        twin[start:stop] = layout.rows(start, stop).dense(kernel.dtype)
    return True
