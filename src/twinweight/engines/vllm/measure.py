"""Crossovers inside vLLM: a layer's inner kernel against a dense GEMM, on the server's own weights and device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twinweight.crossover import CPU_ELEMENTS, Measured, rotation, time_variants, twin_choice
from twinweight.engines.vllm import build
from twinweight.kernels import backend_for, dense_linear
from twinweight.paths import Path, Route
from twinweight.timing import Timing

if TYPE_CHECKING:
    from twinweight.engines.vllm.kernel import TwinLinearKernel

INT4 = "int4"


@dataclass(frozen=True)
class Kind:
    """What a measurement holds for: two layers of equal `Kind` run at equal speed."""

    n: int
    k: int
    group_size: int
    weight: str
    zero_points: bool
    act_order: bool
    dtype: torch.dtype
    inner: str

    def __str__(self) -> str:
        return f"{self.n}x{self.k} ({self.inner})"


def kind_of(kernel: TwinLinearKernel) -> Kind:
    """The `Kind` of a layer."""
    c = kernel.config
    return Kind(
        kernel.n, kernel.k, c.group_size, str(c.weight_type), c.zero_points, getattr(c, "has_g_idx", False), kernel.dtype,
        type(kernel.inner).__name__,
    )  # fmt: skip


@torch.inference_mode()
def measure(layers: Sequence[TwinLinearKernel]) -> Measured:
    """Time the inner kernel and the dense GEMMs of the dtypes a twin may have; `layers` are of one kind.

    Calls rotate over the layers, and over copies of the dense weight, so that caches do not answer for memory. On a CPU a
    slice of rows stands for the weight, and its time is scaled. On a GPU graphs are timed: at few rows a launch costs
    more than the kernel, and a server decodes from graphs.
    """
    first = layers[0]
    device = next(first.layer.parameters()).device
    n = first.n
    if device.type == "cpu":
        n = min(n, max(64, CPU_ELEMENTS // first.k // 64 * 64))
    used = layers[: rotation(device, n * first.k // 2)]
    parts = [build.slice_of(k, n) if n < k.n else None for k in used]
    whole = any(part is None for part in parts)
    inners = [_inner(k, None if whole else part) for k, part in zip(used, parts, strict=True)]
    variants: dict[str, Callable[[Tensor], object]] = {INT4: _rotating(inners)}
    for dtype in backend_for(device).twin_dtypes(first.dtype):
        copies = rotation(device, n * first.k * dtype.itemsize)
        twins = [backend_for(device).empty_twin(n, first.k, dtype, device).normal_() for _ in range(copies)]
        variants[twin_choice(dtype)] = _rotating([_dense(t) for t in twins])
    wrap = _graphed if device.type == "cuda" else _plain
    measured = time_variants(variants, first.k, n, first.dtype, device, repeats=3, wrap=wrap)
    factors = {name: 1 if name == INT4 and whole else first.n / n for name in variants}
    scaled = {name: tuple(_times(x, factors[name]) for x in t) for name, t in measured.times.items()}
    return replace(measured, times=scaled, n=first.n)


def route(measured: Measured, dtype: torch.dtype, least: int) -> Route:
    """The route of a layer with a twin of `dtype`, which serves no fewer than `least` rows."""
    found = measured.route([INT4, twin_choice(dtype)])
    start = found.start_of(Path.TWIN)
    return found if start is None else twin_from(max(start, least))


def twin_from(rows: int) -> Route:
    """int4 below `rows`, the twin from there on."""
    return Route((0, rows), (Path.INT4, Path.TWIN)) if rows > 0 else Route.always(Path.TWIN)


def _inner(kernel: TwinLinearKernel, part: object) -> Callable[[Tensor], object]:
    return lambda x: kernel.inner.apply_weights(kernel.layer if part is None else part, x, None)


def _dense(twin: Tensor) -> Callable[[Tensor], object]:
    return lambda x: dense_linear(x, twin, None)


def _rotating(calls: Sequence[Callable[[Tensor], object]]) -> Callable[[Tensor], object]:
    turn = itertools.cycle(calls)
    return lambda x: next(turn)(x)


def _times(t: Timing, factor: float) -> Timing:
    return Timing(t.median * factor, t.min * factor, t.max * factor)


def _plain(run: Callable[[], None]) -> Callable[[], object]:
    return run


def _graphed(run: Callable[[], None]) -> Callable[[], object]:
    """The replay of a CUDA graph of `run`; `run` itself where a kernel cannot be captured."""
    run()  # kernels are compiled and workspaces allocated outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    replay: Callable[[], object] = graph.replay
    return replay
