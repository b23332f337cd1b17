"""Crossovers inside vLLM: a layer's inner kernel against a dense GEMM, on the server's own weights and device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from twinweight.cache import Cache
from twinweight.crossover import CPU_ELEMENTS, rotation, time_variants, twin_choice
from twinweight.engines.vllm import compat
from twinweight.engines.vllm.layout import slice_of
from twinweight.kernels import backend_for, dense_linear
from twinweight.measured import Costs, Form, Measured
from twinweight.paths import Path, Route
from twinweight.plan import Offer, TwinOption
from twinweight.workload import Workload

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

    @property
    def key(self) -> dict[str, object]:
        """What the cache knows it by."""
        return {"engine": "vllm", **asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


def kind_of(kernel: TwinLinearKernel) -> Kind:
    """The `Kind` of a layer."""
    c = kernel.config
    return Kind(
        kernel.n, kernel.k, c.group_size, str(c.weight_type), c.zero_points, getattr(c, "has_g_idx", False), kernel.dtype,
        type(kernel.inner).__name__,
    )  # fmt: skip


def known_or_measured(kind: Kind, layers: Sequence[TwinLinearKernel], store: Cache | None) -> Measured:
    """The times of a kind of layer, from the cache where they are there."""
    device, vllm = next(layers[0].layer.parameters()).device, compat.version()
    needed = {INT4, *(twin_choice(d) for d in backend_for(device).twin_dtypes(kind.dtype))}
    found = store.read(kind.key, device, vllm=vllm) if store is not None else None
    if found is None or not needed <= set(found.times):
        found = measure(layers)
        if store is not None:
            store.write(kind.key, device, found, vllm=vllm)
    return found


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
    parts = [slice_of(k, n) if n < k.n else None for k in used]
    whole = any(part is None for part in parts)
    inners = [_inner(k, None if whole else part) for k, part in zip(used, parts, strict=True)]
    variants: dict[str, Callable[[Tensor], object]] = {INT4: _rotating(inners)}
    for dtype in backend_for(device).twin_dtypes(first.dtype):
        copies = rotation(device, n * first.k * dtype.itemsize)
        twins = [backend_for(device).empty_twin(n, first.k, dtype, device).normal_() for _ in range(copies)]
        variants[twin_choice(dtype)] = _rotating([_dense(t) for t in twins])
    wrap = _graphed if device.type == "cuda" else _plain
    measured = time_variants(variants, first.k, n, first.dtype, device, wrap=wrap)
    factors = {name: 1 if name == INT4 and whole else first.n / n for name in variants}
    scaled = {name: tuple(x.times(factors[name]) for x in t) for name, t in measured.times.items()}
    return replace(measured, times=scaled, n=first.n)


def offer(kernel: TwinLinearKernel, measured: Measured | None, device: torch.device, rows: int | None, least: int) -> Offered:
    """What a kind of layer could have, and which rows a twin would serve.

    measured: its times; None where there are none: then a twin serves from `rows` rows on, or where that is None there is no
    twin. least: int4 serves all calls of fewer rows.
    """
    backend = backend_for(device)
    sizes = {d: backend.twin_bytes(kernel.n, kernel.k, d, device) for d in backend.twin_dtypes(kernel.dtype)}
    dtypes = {str(d).removeprefix("torch."): nbytes for d, nbytes in sizes.items()}
    if measured is not None:
        twins = tuple(Form(d, nbytes, (INT4, f"twin:{d}")) for d, nbytes in dtypes.items())
        return Costs(measured, Form("none", 0, (INT4,)), twins, kernel.n, least)
    given = {} if rows is None else dtypes
    return Given(tuple(Form(d, n, (INT4, f"twin:{d}")) for d, n in given.items()), kernel.n * kernel.k, max(rows or 0, least))


class Offered(Offer, Protocol):
    """An `Offer` that knows its routes."""

    @property
    def forms(self) -> tuple[Form, ...]:
        """What a layer could have."""

    def route(self, form: Form | None = None) -> Route:
        """Which path serves which rows, with a form or without any."""


@dataclass(frozen=True)
class Given:
    """The `Offer` where the crossover was given and nothing timed: each weight is worth the same."""

    forms: tuple[Form, ...]
    weights: int
    rows: int

    def route(self, form: Form | None = None) -> Route:
        """int4 below `rows`, the twin from there on."""
        if form is None:
            return Route.always(Path.INT4)
        return Route((0, self.rows), (Path.INT4, Path.TWIN)) if self.rows > 0 else Route.always(Path.TWIN)

    def options(self, workload: Workload) -> tuple[TwinOption, ...]:
        """The forms, one as good as the other."""
        return tuple(TwinOption(f.name, f.nbytes, self.weights / 1e6, f.is_twin) for f in self.forms)


def _inner(kernel: TwinLinearKernel, part: object) -> Callable[[Tensor], object]:
    return lambda x: kernel.inner.apply_weights(kernel.layer if part is None else part, x, None)


def _dense(twin: Tensor) -> Callable[[Tensor], object]:
    return lambda x: dense_linear(x, twin, None)


def _rotating(calls: Sequence[Callable[[Tensor], object]]) -> Callable[[Tensor], object]:
    turn = itertools.cycle(calls)
    return lambda x: next(turn)(x)


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
