"""The opaque op of a wrapped layer: it sees the real number of rows, at run time, and calls the inner kernel or the twin.

It takes a handle, not the twin: a twin as an argument makes layers with and without one different graphs (measured with 9 of
16 twins: 4 compiled artifacts, not 3) and the plan a part of what is compiled. With a handle, which no trace looks into, all
layers of a shape share one graph whatever the plan, and a twin can be dropped after compiling.

The handle is the address of a tensor on the weight's device; its content is never read. A CPU tensor that holds a number is as
easily read, but Inductor takes it for an unaligned input, and so every output of the op: the kernels that followed lost their
vector loads (H200: decode of a 16-layer qwen3-32b 3 % slower).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, mm

from twinweight import twin
from twinweight.kernels import dense_linear, gpu, int4_path
from twinweight.kernels.prepared import KernelWeight
from twinweight.labels import is_recording, labelled
from twinweight.paths import Path, calls, counted, take
from twinweight.steps import Step, Steps, keep


class Paths(Protocol):
    """What the op asks of a kernel. twin_t, scales_t: the twin as products take it, on a GPU (`twin.turned`). steps: what its
    route leads to (`steps_of`); `again`, without a bias, is of `gpu.again` or `twin.again`.
    """

    n: int
    route: list[int]
    steps: Steps
    twin: Tensor | None
    twin_scales: Tensor | None
    twin_t: Tensor | None
    scales_t: Tensor | None
    bias: Tensor | None
    own: KernelWeight | None

    def inner_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By vLLM's own kernel."""


_paths: dict[int, Callable[[], Paths | None]] = {}


def handle_for(kernel: Paths, device: torch.device) -> Tensor:
    """A handle of a kernel, which it does not keep alive; the kernel must keep the handle."""
    handle = torch.empty(1, dtype=torch.int64, device=device)
    address = handle.data_ptr()
    _paths[address] = weakref.ref(kernel)
    weakref.finalize(kernel, _paths.pop, address, None)
    return handle


def kernels() -> list[Paths]:
    """The kernels that live."""
    return [k for k in (ref() for ref in list(_paths.values())) if k is not None]


def linear(x: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """The op: x [..., K] -> [..., N] by the kernel of a handle."""
    kernel = _paths[handle.data_ptr()]()
    if kernel is None:
        raise RuntimeError("the layer of this handle is gone")
    return run(kernel, x, bias)


def run(kernel: Paths, x: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., K] -> [..., N] by the path that the kernel's route names for the product of x's leading sizes."""
    shape = x.shape
    step = kernel.steps.get(shape[0]) if len(shape) == 2 else None
    if step is None or is_recording():
        return _first(kernel, x, bias)
    calls[step.counted] += 1
    if bias is None:
        twin_t, again = kernel.twin_t, step.again
        if step.path == _TWIN and twin_t is not None and kernel.twin_scales is None:
            return mm(x, twin_t)
        if again is not None and x.is_contiguous() and not x.data_ptr() & 15:
            if step.path != _TWIN and (weight := kernel.own) is not None:
                return again(x, weight, None)
            if step.path == _TWIN and twin_t is not None:
                return again(x, twin_t, kernel.scales_t)
    return _by(step.path, kernel, x, bias)


def _first(kernel: Paths, x: Tensor, bias: Tensor | None) -> Tensor:
    """`run` for a number of rows not met before, which it keeps in mind where x lies as most do; for x of more dimensions; and
    under a profiler.
    """
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    path = take(kernel.route, m)
    with labelled(path, m, kernel.n, x.shape[-1]):
        y = _by(path, kernel, rows, bias)
    if not flat:
        return y.view(*x.shape[:-1], kernel.n)
    if x.is_contiguous() and not x.data_ptr() & 15:
        keep(kernel.steps, m, Step(path, counted(path, m), None if x.is_cpu else _again(path, kernel, x)))
    return y


def _again(path: int, kernel: Paths, x: Tensor) -> Callable[..., Tensor] | None:
    """Of `Step`."""
    if path == _TWIN and kernel.twin is not None and kernel.twin_scales is not None:
        return twin.again(x, kernel.twin, kernel.twin_scales)
    if path in _OWN and kernel.own is not None:
        return gpu.again(path, x, kernel.own, None)
    return None


def _by(path: int, kernel: Paths, x: Tensor, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N]."""
    plain = None if bias is None else kernel.bias
    if path == _TWIN and kernel.twin is not None:
        if kernel.twin_scales is None:
            return dense_linear(x, kernel.twin, plain)
        return twin.linear(x, kernel.twin, kernel.twin_scales, plain)
    if path != _TWIN and path != _INNER and kernel.own is not None:
        return int4_path(path, x, kernel.own, plain)
    # Some kernels pad N and return a slice; the traced graph counts on dense rows.
    return kernel.inner_linear(x, bias).contiguous()


_TWIN, _INNER = int(Path.TWIN), int(Path.INNER)
_OWN = Path.INT4, Path.FUSED


def _fake(x: Tensor, handle: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


_library = torch.library.Library("twinweight", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("vllm_linear(Tensor x, Tensor handle, Tensor? bias, int n) -> Tensor")  # type: ignore[no-untyped-call]
for _key in ("CPU", "CUDA", "XPU"):  # ROCm's devices dispatch as CUDA; a key of its own is found sooner than a composite one
    _library.impl("vllm_linear", linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("twinweight::vllm_linear", _fake, lib=_library)
