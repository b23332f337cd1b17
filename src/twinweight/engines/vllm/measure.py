"""Crossovers inside vLLM: layers' inner kernels against all that is ours, on the server's own weights and device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from twinweight import twin
from twinweight.cache import Cache
from twinweight.crossover import CPU_ELEMENTS, rotation, twin_choice, variants
from twinweight.engines.vllm import compat, own
from twinweight.engines.vllm.kinds import Kind, dense_kind, kind_of, shape_of
from twinweight.engines.vllm.layout import slice_of
from twinweight.engines.vllm.offers import INT4, OWN, forms_of
from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.graphs import Graphs, Wrap
from twinweight.kernels.launch import compile_together
from twinweight.measured import Measured
from twinweight.memory import is_out_of_memory, read_memory
from twinweight.search import FULL, Search, grid, load_together
from twinweight.timing import in_turn

log = logging.getLogger("vllm.twinweight")

SECONDS = 15.0
"""What a start-up may spend on measuring, all kinds of layers together: beside Machete an H200 takes 8 s for llama-3.1-8b
and 11 for qwen3-32b, a third of it under load and as much for first calls (`h200-start-up.json`), CPUs take 4 to 14. A kernel's
first call is not counted: humming compiles all it has there, as a server does sooner or later.
"""

_LOAD = 0.2
"""Seconds that a path which may be the best at the most rows is timed for there: a server with full chunks is busy."""

_SHARE = 0.5
"""Of the free memory, what weights that are timed at once may take."""

W = TypeVar("W", bound=Wrapped)


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
    for kinds in _at_once(new, lossy, most):
        times = measure([new[kind] for kind in kinds], lossy, SECONDS / len(new), most)
        for kind, found[kind] in zip(kinds, times, strict=True):
            # What the time limit cut short is measured anew at the next start, when its kernels are compiled; a CPU has none.
            if store is not None and (found[kind].whole or new[kind][0].device.type == "cpu"):
                store.write(_key_of(kind, new[kind], most), new[kind][0].device, found[kind], vllm=vllm)
    return found


def _at_once(new: Mapping[Kind, Sequence[W]], lossy: Callable[[W], Sequence[str]], most: int) -> Iterator[list[Kind]]:
    """The kinds in groups that are timed at once: as many as fit into memory, but on CPUs, which have no load to share, one."""
    group: list[Kind] = []
    taken = free = 0.0
    for kind, (first, *_) in new.items():
        nbytes = _timed_bytes(first, lossy(first), most)
        if group and (first.device.type == "cpu" or taken + nbytes > _SHARE * free):
            yield group
            group, taken = [], 0
        free = free or read_memory(first.device).free
        group, taken = [*group, kind], taken + nbytes
    if group:
        yield group


def _timed_bytes(kernel: Wrapped, lossy: Sequence[str], most: int) -> int:
    """What timing a kind of layer allocates, at most: weights to rotate over, activations and products of the most rows."""
    shape, device = shape_of(kernel), kernel.device
    twins = (twin.nbytes(kind, shape.n, shape.k, device) for kind in (dense_kind(kernel), *lossy))
    weights = sum(nbytes * rotation(device, nbytes) for nbytes in (shape.n * shape.k // 2, *twins))
    return weights + grid(device, most)[-1] * (shape.n + shape.k) * shape.dtype.itemsize


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
    """Calls, on tensors without data, that launch all kernels of ours a layer may ever need."""
    if own.can_have(kernel):
        shape = shape_of(kernel)
        yield from own.launches(shape.n, shape.k, shape.group_size, shape.dtype, most, symmetric=shape.symmetric)


@torch.inference_mode()
def measure(
    layers: Sequence[Sequence[W]], lossy: Callable[[W], Sequence[str]], seconds: float = math.inf, most: int = 0
) -> list[Measured]:
    """Time the inner kernel and all that a layer could have besides; layers: of each kind those that there are.

    Calls rotate over the layers, and over copies of what is ours, so that caches do not answer for memory. On a CPU a
    slice of rows stands for the weight, and its time is scaled. On a GPU graphs are timed: at few rows a launch costs
    more than the kernel, and a server decodes from graphs; and what may be the best at the most rows is timed under load, all
    kinds together. seconds: for each kind. most: the most rows of a step.
    """
    began = time.perf_counter()
    wrap = Graphs().replayed if layers[0][0].device.type == "cuda" else None
    timings = [_Timing.of(same, lossy(same[0]), seconds, most, wrap) for same in layers]
    ready = time.perf_counter()
    for timing in timings:
        timing.search.over_grid()
    timed = time.perf_counter()
    if layers[0][0].device.type != "cpu":
        load_together([t.search for t in timings], _LOAD)
    loaded = time.perf_counter()
    found = [timing.finish() for timing in timings]
    log.debug(
        "Twinweight: timed %s: %.1f s to begin, %.1f for the grid, %.1f under load, %.1f around takeovers",
        ", ".join(str(kind_of(same[0])) for same in layers), ready - began, timed - ready, loaded - timed,
        time.perf_counter() - loaded,
    )  # fmt: skip
    return found


@dataclass
class _Timing:
    """One kind of layer that is timed. factors: by choice, how many times as long the whole weight takes."""

    search: Search
    n: int
    factors: Mapping[str, float]
    failed: tuple[str, ...]

    @staticmethod
    def of(layers: Sequence[W], lossy: Sequence[str], seconds: float, most: int, wrap: Wrap | None) -> _Timing:
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
        search = Search(calls, first.k, n, first.dtype, device, orders, lambda m: wrap, seconds, most)
        return _Timing(search, first.n, {name: 1 if name == INT4 and whole else first.n / n for name in calls}, failed)

    def finish(self) -> Measured:
        """The times of the whole weight."""
        found = self.search.around_takeovers()
        scaled = {name: tuple(x.times(self.factors[name]) for x in t) for name, t in found.times.items()}
        return replace(found, times=scaled, n=self.n, failed=self.failed)


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


def _ours(kernel: Wrapped, lossy: Sequence[str]) -> dict[str, str]:
    """What can be timed beside the inner kernel: its name here, and in `crossover.variants`."""
    kinds = {twin_choice(kind): twin_choice(kind) for kind in (dense_kind(kernel), *lossy)}
    if not own.can_have(kernel):
        return kinds
    fused = {"fused": "fused"} if kernel.device.type != "cpu" else {}  # on a CPU that is INT4
    return {OWN: INT4, **fused, "stream": "stream", **kinds}


def _inner(kernel: Wrapped, part: object) -> Callable[[Tensor], object]:
    return lambda x: kernel.inner.apply_weights(kernel.layer if part is None else part, x, None)
