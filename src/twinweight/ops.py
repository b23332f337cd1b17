"""The one opaque custom op: it looks at the real number of rows, at run time, and calls a path.

A Python branch on the number of rows would be traced with a prefill-sized example and reused at decode. Inside this op
nothing is traced, so one compiled graph serves all sizes. It takes tensors only, no per-layer constant: layers of one shape
share a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twinweight import paths
from twinweight import twin as twins
from twinweight.kernels import backend_for, dense_linear, int4_path
from twinweight.kernels.prepared import KernelWeight
from twinweight.labels import is_recording, labelled
from twinweight.steps import Step

_library = torch.library.Library("twinweight", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, Tensor? twin, "
    "Tensor? twin_scales, int[] route, int group_size, int n) -> Tensor"
)


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    twin: Tensor | None,
    twin_scales: Tensor | None,
    route: list[int],
    group_size: int,
    n: int,
) -> Tensor:
    """The op; see `run`. packed, scales, zeros, perm, group_size: a `KernelWeight`."""
    return run(x, KernelWeight(packed, scales, zeros, perm, group_size, n, x.shape[-1]), bias, twin, twin_scales, route)


def run(
    x: Tensor, w: KernelWeight, bias: Tensor | None, twin: Tensor | None, twin_scales: Tensor | None, route: list[int]
) -> Tensor:
    """x: [..., K] -> [..., N] by the path that `route` (`Route.flat()`) names for the product of x's leading sizes.

    twin, twin_scales: of any kind (`twin.py`), or None. Raises TypeError where x has another dtype than the scales,
    ValueError where the route leads to a twin that is not there.
    """
    if x.dtype != w.scales.dtype:
        raise TypeError(f"activations are {x.dtype}, the int4 weight was loaded for {w.scales.dtype}")
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    m = rows.shape[0]
    if rows.stride(1) != 1 and shape[-1] > 1:
        rows = rows.contiguous()
    path = paths.take(route, m)
    if m == 0:
        return x.new_empty(*shape[:-1], w.n)
    if is_recording():
        with labelled(path, m, w.n, shape[-1]):
            y = _by(path, rows, w, bias, twin, twin_scales)
    else:
        y = _by(path, rows, w, bias, twin, twin_scales)
    return y if len(shape) == 2 else y.view(*shape[:-1], w.n)


def _by(path: int, x: Tensor, w: KernelWeight, bias: Tensor | None, twin: Tensor | None, twin_scales: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N]."""
    if path != _TWIN:
        return int4_path(path, x, w, bias)
    if twin is None:
        raise ValueError("the route leads to the twin, but this weight has none")
    return twins.linear(x, twin, twin_scales, bias)


def step_of(
    x: Tensor, w: KernelWeight, bias: Tensor | None, twin: Tensor | None, twin_scales: Tensor | None, route: list[int]
) -> Step:
    """What `run` leads to for x of this size. again: (x, contiguous and aligned to 16 bytes; the int4 weight, or the twin where
    that is the path; bias) -> y.
    """
    m = x.shape[:-1].numel()
    path = paths.pick(route, m)
    again: Callable[..., Tensor] | None = None
    if m and path != _TWIN:
        again = backend_for(x.device).again(path, x, w, bias)
    elif m and twin is not None and twin_scales is None:
        again = dense_linear if x.is_cpu or twin.dtype != x.dtype else torch.nn.functional.linear
    return Step(path, paths.counted(path, m), again)


def only_computes(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a call on x is wanted for its result alone: not traced, watched, profiled, mapped or differentiated.

    Then `run` may be called as it is, and the dispatcher's 4 us saved (2-core x86 CPU; this takes 0.4).
    """
    return not (
        _is_compiling()
        or type(x) is not Tensor
        or is_recording()
        or _dispatch_modes()
        or _tracing_state() is not None
        or _functorch_level() is not None
        or ((x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled())
    )


_TWIN = int(paths.Path.TWIN)
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


def _fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    twin: Tensor | None,
    twin_scales: Tensor | None,
    route: list[int],
    group_size: int,
    n: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, perm, bias, _, _, _, group_size, n = inputs
    ctx.save_for_backward(packed, scales, zeros, perm)
    ctx.sizes, ctx.dtype, ctx.bias = (group_size, n, x.shape[-1]), x.dtype, bias is not None and bias.requires_grad


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, by the dense weight whatever path computed y, and of a bias that is trained; the int4 weight itself has none."""
    packed, scales, zeros, perm = ctx.saved_tensors
    group_size, n, k = ctx.sizes
    x = None
    if ctx.needs_input_grad[0]:
        dense = torch.empty(n, k, dtype=ctx.dtype, device=packed.device)
        backend_for(packed.device).expand(KernelWeight(packed, scales, zeros, perm, group_size, n, k), dense)
        x = grad @ dense
    bias = grad.reshape(-1, n).sum(0) if ctx.bias else None
    return (x, None, None, None, None, bias, None, None, None, None, None)


for _key in ("CPU", "CUDA", "XPU"):  # ROCm's devices dispatch as CUDA
    _library.impl("linear", linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("twinweight::linear", _fake, lib=_library)
torch.library.register_autograd("twinweight::linear", _gradients, setup_context=_remember, lib=_library)
