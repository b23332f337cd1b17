"""The one opaque custom op: it looks at the real number of rows, at run time, and calls a path.

A Python branch on the number of rows would be traced with a prefill-sized example and reused at decode. Inside this op
nothing is traced, so one compiled graph serves all sizes. It takes tensors only, no per-layer constant: layers of one shape
share a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight import paths
from twinweight import twin as twins
from twinweight.kernels import int4_path
from twinweight.kernels.prepared import KernelWeight
from twinweight.labels import labelled

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
    """x: [..., K] -> [..., N] by the path that `route` (`Route.flat()`) names for the product of x's leading sizes.

    packed, scales, zeros, perm, group_size: a `KernelWeight`; twin, twin_scales: of any kind (`twin.py`), or None.
    Raises TypeError where x has another dtype than the scales, ValueError where the route leads to a twin that is not there.
    """
    if x.dtype != scales.dtype:
        raise TypeError(f"activations are {x.dtype}, the int4 weight was loaded for {scales.dtype}")
    rows = x.reshape(-1, x.shape[-1])
    m = rows.shape[0]
    path = paths.pick(route, m)
    paths.count(path, m)
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    with labelled(path, m, n, x.shape[-1]):
        if path == paths.Path.TWIN:
            if twin is None:
                raise ValueError("the route leads to the twin, but this weight has none")
            y = twins.linear(rows, twin, twin_scales, bias)
        else:
            w = KernelWeight(packed, scales, zeros, perm, group_size, n, x.shape[-1])
            y = int4_path(path, rows, w, bias)
    return y.view(*x.shape[:-1], n)


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


for _key in ("CPU", "CUDA", "XPU"):  # ROCm's devices dispatch as CUDA
    _library.impl("linear", linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("twinweight::linear", _fake, lib=_library)
