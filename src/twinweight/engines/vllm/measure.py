"""Crossovers inside vLLM: a layer's inner kernel against a dense GEMM, on the server's own weights and device."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from twinweight import twin
from twinweight.cache import Cache
from twinweight.crossover import CPU_ELEMENTS, Shape, rotation, twin_choice, variants
from twinweight.engines.vllm import compat, own
from twinweight.engines.vllm.layout import slice_of
from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.graphs import Graphs
from twinweight.kernels import backend_for, gpu
from twinweight.kernels.launch import compile_together
from twinweight.kernels.prepared import takes_group
from twinweight.measured import Costs, Form, Measured
from twinweight.memory import is_out_of_memory
from twinweight.paths import Path, Route
from twinweight.plan import MARGIN, Offer, TwinOption
from twinweight.search import FULL, grid, time_variants
from twinweight.timing import in_turn
from twinweight.workload import HEAD_ROWS, Workload

log = logging.getLogger("vllm.twinweight")

SECONDS = 15.0
"""What a start-up may spend on measuring, all kinds of layers together: Machete and Marlin take 7 to 9 s on an H200 (15 and 24
for llama-3.3-70b and qwen3-32b on Machete at first starts, compiling included), CPUs 4 to 12. A kernel's first call is not
counted: humming compiles all it has there, as a server does sooner or later.
"""

_LOAD = 0.3
"""Seconds that a path which may be the best at the most rows is timed for there: a server with full chunks is busy."""

W = TypeVar("W", bound=Wrapped)

INT4 = "int4"
OWN = "own"
"""The inner kernel, and our int4 kernel on a copy of the weight in our layout (`own`)."""

_ORDER = ((INT4, Path.INNER), (OWN, Path.INT4), *(("fused", Path.FUSED), (INT4, Path.INNER)) * 3)
"""In which order paths may take over on a GPU where there is an own copy. Some inner kernels are better with few rows, others
with hundreds, and then where those fill their tiles (Machete: at 512, from 1024 on): theirs may be any parts. Three, as two may
be at hundreds of rows: 51200 x 5120 by Machete at 98 to 270 and from 405 on could have no `fused` at 16384, where steps take
0.97 times as long by it (`h200-vllm-routes.json`).
"""


_OURS = (OWN, "fused")
_ALONE = ((16, 1.05), (256, 1.1))
"""(Up to so many rows, how many times as long our kernels may take in a server as by themselves, against vLLM's.)

Servers of llama-3.1-8b and qwen3-32b on H200s with own copies (`benchmarks/results/h200-vllm.json`, `server` 9-*): steps of
decode became faster as if ours took 0.95 to 0.99 times as long as their times by themselves (`h200-paths.json`) at 1 row, 0.97
to 1.06 at 32, 1.08 at 64 and 1.05 to 1.08 at 128. They unpack on all multiprocessors while they read, and a server's GPU comes
to its power limit, where that costs clocks that a short measurement keeps (`h200-vllm-clocks.json`).
"""

_QUEUED, _STREAMED = 192, 1.25
"""W4A16 layers beyond which `stream` counts as taking so many times as long in a server.

With 12 launches for a transformer layer of four linears, and one to three more for each that streams, those of a model of 64
layers no longer fit a driver's queue (some 800, by these times): the host waits until much of a step has run, and only then
hands on the first tokens of the step before. qwen3-32b on an H200, steps of 16384 tokens: with 51200 x 5120 by `stream` (192
launches more) steps took 0.971 times as long and first tokens came 1.039 times as late, with `fused` both 0.976; 64 launches
more, for 5120 x 8192 or 5120 x 25600, 1.003 and 1.007, 1.012 and 1.016, and for 10240 x 5120, which is 1.1 times as fast by
it, 0.989 and 1.011 (`h200-vllm-routes.json`).
"""

_SPARED = 1.1
"""How many times as long a call of any size may take, so that the inner kernel's weight can be freed."""

_SETTINGS = ("VLLM_HUMMING_USE_F16_ACCUM", "VLLM_MARLIN_USE_ATOMIC_ADD")
"""Variables by which inner kernels of one name run at different speeds."""


@dataclass(frozen=True)
class Kind:
    """What a measurement holds for: two layers of equal `Kind` run at equal speed. copyable: as in `Wrapped`. most: rows of
    its calls, 0 for as many as a step has.
    """

    n: int
    k: int
    group_size: int
    weight: str
    zero_points: bool
    act_order: bool
    dtype: torch.dtype
    inner: str
    settings: str = ""
    copyable: bool = True
    most: int = 0

    def __str__(self) -> str:
        return f"{self.n}x{self.k} ({self.inner})"

    @property
    def key(self) -> dict[str, object]:
        """What the cache knows it by."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("copyable", "most")}
        return {"engine": "vllm", **fields, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def timed(self) -> Kind:
        """The kind as it was timed, with a copy and for any rows."""
        return replace(self, copyable=True, most=0)


def kind_of(kernel: Wrapped) -> Kind:
    """The `Kind` of a layer."""
    c = kernel.config
    settings = ",".join(f"{name}={value}" for name in _SETTINGS if (value := os.environ.get(name)))
    return Kind(
        kernel.n, kernel.k, c.group_size, str(c.weight_type), c.zero_points, getattr(c, "has_g_idx", False), kernel.dtype,
        type(kernel.inner).__name__, settings, kernel.copyable, _most(kernel),
    )  # fmt: skip


def _most(kernel: Wrapped) -> int:
    """Of `Kind`; an output head is a `ParallelLMHead`."""
    return HEAD_ROWS if hasattr(kernel.layer, "org_vocab_size") else 0


def known_or_measured(
    layers: Mapping[Kind, Sequence[W]], lossy: Callable[[W], Sequence[str]], store: Cache | None, most: int = own.SIZES[-1]
) -> dict[Kind, Measured]:
    """The times of all kinds of layers of a device, from the cache where they are there. lossy: the kinds of 8-bit twins to
    time besides, of a layer. most: the most rows of a step.
    """
    vllm, found = compat.version(), {}
    for kind, same in layers.items():
        first = same[0]
        known = store.read(_key_of(kind, same, most), first.device, vllm=vllm) if store is not None else None
        if known is not None and known.tried({INT4, *_ours(first, lossy(first))}):
            found[kind] = known
    new = {kind: same for kind, same in layers.items() if kind not in found}
    if any(first.device.type != "cpu" for first, *_ in new.values()):
        began = time.perf_counter()
        compile_together(call for first, *_ in new.values() for call in launches(first, most))
        log.debug("Twinweight: kernels compiled, or found so, in %.1f s", time.perf_counter() - began)
    for kind, same in new.items():
        began = time.perf_counter()
        found[kind] = measure(same, lossy(same[0]), SECONDS / len(new), most)
        log.debug("Twinweight: %s timed in %.1f s", kind, time.perf_counter() - began)
        # What the time limit cut short is measured anew at the next start, when its kernels are compiled.
        if store is not None and found[kind].whole:
            store.write(_key_of(kind, same, most), same[0].device, found[kind], vllm=vllm)
    return found


def is_known(store: Cache | None, kind: Kind, device: torch.device, most: int) -> bool:
    """Whether the times of such layers, of as many as there are in a model, are in the cache."""
    return store is not None and store.read(_key(kind, device, most), device, vllm=compat.version()) is not None


def _key(kind: Kind, device: torch.device, most: int) -> dict[str, object]:
    """What the cache knows the times by."""
    return kind.key if grid(device, most) == grid(device) else {**kind.key, "rows": FULL}


def _key_of(kind: Kind, same: Sequence[Wrapped], most: int) -> dict[str, object]:
    """The same for these layers. Times of too few to rotate over are for as few alone: caches answered."""
    key = _key(kind, same[0].device, most)
    return {**key, "layers": len(same)} if len(same) < _rotated(same[0]) else key


def _timed_rows(kernel: Wrapped) -> int:
    """Output features that are timed."""
    return kernel.n if kernel.device.type != "cpu" else min(kernel.n, max(64, CPU_ELEMENTS // kernel.k // 64 * 64))


def _rotated(kernel: Wrapped) -> int:
    """Layers that calls of the inner kernel rotate over."""
    return rotation(kernel.device, _timed_rows(kernel) * kernel.k // 2)


def launches(kernel: Wrapped, most: int) -> Iterator[Callable[[], object]]:
    """Calls, on tensors without data, that launch all kernels of ours a layer may ever need; `stream` has one for all rows."""
    shape = shape_of(kernel)
    rows = own.sizes(most) if own.can_have(kernel) else ()
    return gpu.launches(shape.n, shape.k, shape.group_size, shape.dtype, rows, symmetric=shape.symmetric)


@torch.inference_mode()
def measure(layers: Sequence[Wrapped], lossy: Sequence[str] = (), seconds: float = math.inf, most: int = 0) -> Measured:
    """Time the inner kernel and all that a layer could have besides; `layers` are of one kind.

    Calls rotate over the layers, and over copies of what is ours, so that caches do not answer for memory. On a CPU a
    slice of rows stands for the weight, and its time is scaled. On a GPU graphs are timed: at few rows a launch costs
    more than the kernel, and a server decodes from graphs. most: the most rows of a step.
    """
    first = layers[0]
    device, n = first.device, _timed_rows(first)
    used = layers[: _rotated(first)]
    parts = [slice_of(k, n) if n < k.n else None for k in used]
    whole = any(part is None for part in parts)
    inners = [_inner(k, None if whole else part) for k, part in zip(used, parts, strict=True)]
    ours = _ours(first, lossy)
    timed = variants(shape_of(first), n, list(ours.values()))
    ready, failed = _ready({name: timed[choice] for name, choice in ours.items()}, first, most)
    calls = {INT4: in_turn(inners), **ready}
    orders = [f.choices for f in forms_of(first, lossy) if set(f.choices) <= set(calls)]
    wrap = Graphs().replayed if device.type == "cuda" else None
    measured = time_variants(
        calls, first.k, n, first.dtype, device, orders=orders, wraps=lambda m: wrap, seconds=seconds,
        load=_LOAD if device.type != "cpu" else 0.0, most=most,
    )  # fmt: skip
    factors = {name: 1 if name == INT4 and whole else first.n / n for name in calls}
    scaled = {name: tuple(x.times(factors[name]) for x in t) for name, t in measured.times.items()}
    return replace(measured, times=scaled, n=first.n, failed=failed)


def _ready(
    calls: Mapping[str, Callable[[Tensor], object]], kernel: Wrapped, most: int
) -> tuple[dict[str, Callable[[Tensor], object]], tuple[str, ...]]:
    """Those of our calls that run for all rows of the grid, and the names of those that never will. A compiler that fails, on a
    GPU that nobody tried, takes no other path along.
    """
    device, ready, failed = kernel.device, {}, []
    if device.type == "cpu":
        return dict(calls), ()
    for name, call in calls.items():
        try:
            for m in grid(device, most):
                call(torch.empty(m, kernel.k, dtype=kernel.dtype, device=device))
            ready[name] = call
        except Exception as error:  # whatever Triton raises
            log.warning("Twinweight does without %s for %s: %s", name, kind_of(kernel), error)
            if not is_out_of_memory(error):
                failed.append(name)
    return ready, tuple(failed)


def shape_of(kernel: Wrapped) -> Shape:
    """What the embedded engine would call a layer's shape."""
    c = kernel.config
    group = kernel.k if c.group_size <= 0 or not takes_group(kernel.k, int(c.group_size)) else int(c.group_size)
    return Shape(kernel.n, kernel.k, group, not c.zero_points, False, kernel.dtype, kernel.device)


def _ours(kernel: Wrapped, lossy: Sequence[str]) -> dict[str, str]:
    """What can be timed beside the inner kernel: its name here, and in `crossover.variants`."""
    kinds = {twin_choice(kind): twin_choice(kind) for kind in (_dense_kind(kernel), *lossy)}
    if not own.can_have(kernel):
        return kinds
    fused = {"fused": "fused"} if kernel.device.type != "cpu" else {}  # on a CPU that is INT4
    return {OWN: INT4, **fused, "stream": "stream", **kinds}


def _dense_kind(kernel: Wrapped) -> str:
    """Of the exact kinds the one with the fastest GEMM; each that is timed takes seconds of a start-up on CPUs."""
    return str(backend_for(kernel.device).stream_dtype(kernel.dtype)).removeprefix("torch.")


def forms_of(kernel: Wrapped, lossy: Sequence[str]) -> tuple[Form, ...]:
    """What a layer could have: twins, an own copy, or both."""
    device = kernel.device
    twins = {kind: twin.nbytes(kind, kernel.n, kernel.k, device) for kind in (_dense_kind(kernel), *lossy)}
    copy = own.nbytes(kernel) if own.can_have(kernel) else None
    return forms(copy, twins, _ORDER if device.type != "cpu" else ((OWN, Path.INT4), (INT4, Path.INNER)))


def forms(copy: int | None, twins: Mapping[str, int], order: Sequence[tuple[str, Path]] = _ORDER) -> tuple[Form, ...]:
    """As `forms_of`. copy: bytes of an own copy, None where there can be none; twins: kind -> bytes; order: the choices of a
    copy and their paths, in the order in which they may take over.
    """
    alone = [Form(kind, nbytes, (INT4, twin_choice(kind))) for kind, nbytes in twins.items()]
    if copy is None:
        return tuple(alone)
    ways, taken = zip(*order, ("stream", Path.STREAM), strict=True)
    both = [Form(f"{OWN}+{f.name}", copy + f.nbytes, (*ways, f.choices[-1]), (*taken, Path.TWIN)) for f in alone]
    return (*alone, Form(OWN, copy, ways, taken, is_twin=False), *both)


def has_copy(form: str) -> bool:
    """Whether a form, by its name, holds an own copy."""
    return OWN in form.split("+")


def twin_of(form: str) -> str | None:
    """The kind of twin in a form, by its name; None for an own copy alone."""
    return next((part for part in form.split("+") if part != OWN), None)


def costs(
    measured: Measured, forms: Sequence[Form], n: int, least: int = 0, *, on_gpu: bool = True, most: int = 0, layers: int = 0
) -> Costs:
    """The `Offer` of measured times. Of these forms, those that were timed. n, least, most: as in `Costs`; layers: of the model
    that have a W4A16 weight.
    """
    timed = tuple(f for f in forms if set(f.choices) <= set(measured.times))
    return Costs(in_a_server(measured, layers) if on_gpu else measured, Form("none", 0, (INT4,)), timed, n, least, most)


def in_a_server(measured: Measured, layers: int = 0) -> Measured:
    """A GPU's times as a server will have them (`_ALONE`, `_STREAMED`). layers: as in `costs`."""
    ours = [next((factor for most, factor in _ALONE if m <= most), 1.0) for m in measured.ms]
    factors = {**dict.fromkeys(_OURS, ours), "stream": [_STREAMED if layers > _QUEUED else 1.0] * len(ours)}
    slower = {
        name: tuple(t.times(f) for t, f in zip(measured.times[name], factors[name], strict=True))
        for name in factors
        if name in measured.times
    }
    return replace(measured, times={**measured.times, **slower})


def offer(
    kernel: Wrapped, measured: Measured | None, rows: int | None, least: int, lossy: Sequence[str] = (), layers: int = 0
) -> Offered:
    """What a kind of layer could have, and which rows a twin would serve.

    measured: its times; None where there are none: then a twin serves from `rows` rows on, or where that is None there is no
    twin. least: decode kernels serve all calls of fewer rows. lossy: kinds of 8-bit twins that were asked for. layers: as in
    `costs`.
    """
    offered, most = forms_of(kernel, lossy), _most(kernel)
    if measured is not None:
        return costs(measured, offered, kernel.n, least, on_gpu=kernel.device.type != "cpu", most=most, layers=layers)
    given = tuple(f for f in offered if not f.paths) if rows is not None and not most else ()
    return Given(given, kernel.n * kernel.k, max(rows or 0, least))


def without_inner(offer: Offered, workload: Workload) -> Offered:
    """The same offer, but copies do without the inner kernel where that costs next to nothing: `MARGIN` of the workload's
    calls, and `_SPARED` at any size. Its weight can be freed then. (llama-3.3-70b on an H200: Marlin is ahead from 32 to 34
    rows of 57344 x 8192, which is no reason to keep 18 GiB.)
    """
    if not isinstance(offer, Costs):
        return offer
    return replace(offer, forms=tuple(_by_ours_alone(offer, form, workload) for form in offer.forms))


def _by_ours_alone(costs: Costs, form: Form, workload: Workload) -> Form:
    if form.is_twin:
        return form
    choices, paths = zip(*((c, p) for c, p in zip(form.choices, form.paths, strict=True) if p != Path.INNER), strict=True)
    alone = replace(form, choices=choices, paths=paths)

    def within(factor: float, calls: Workload, costs: Costs) -> bool:
        return costs.seconds(alone, calls) <= factor * costs.seconds(form, calls)

    close = all(within(_SPARED, Workload.of({m: 1.0}), replace(costs, most=0)) for m in costs.measured.ms)
    return alone if close and within(1 + MARGIN, workload, costs) else form


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

    def gains(self, workload: Workload) -> Mapping[int, tuple[float, float]]:
        """Nothing was timed."""
        return {}


def _inner(kernel: Wrapped, part: object) -> Callable[[Tensor], object]:
    return lambda x: kernel.inner.apply_weights(kernel.layer if part is None else part, x, None)
