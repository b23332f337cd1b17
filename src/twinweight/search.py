"""`Search`: times of the ways to compute one product, by rows: over a grid, then where one takes over from another."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from twinweight import twin
from twinweight.graphs import Wrap
from twinweight.measured import Measured
from twinweight.timing import Timing, interleaved, under_load

GRID = {
    "cpu": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "gpu": (1, 8, 16, 32, 64, 112, 160, 192, 256, 320, 512, 640, 1024, 2048, 8192),
}
"""Rows that are timed for every shape; between two of them a takeover is searched for. A GPU takes 8 rows or more at once, and
kernels take tiles of 128 or 256: at so many rows such a kernel is at its best, and a twin that is 20 % ahead from 129 on seemed
level with it at 128 and 256 (H200, 14336 x 4096). 256 is timed all the same: a twin of 10240 x 5120 is a sixth faster there and
no more than level at 192 and 384, so that a search between 160 and 320 did not find it. So is 512, where Machete is up to 11 %
ahead of `fused`, and up to 26 % behind at 384, and 112, where a twin of 4096 x 4096 is 14 % ahead of `fused`, and not at 64 and
160, and 192, where cuBLAS takes 126 us for 25600 x 5120, 67 at 128 and 102 at 256."""

FULL = 16384
"""Rows of a full step of vLLM's on a large GPU. They are not twice 8192 rows: beside Machete, `fused` takes 0.99 times as long
for 5120 x 25600 at 8192 and 1.06 at 16384, for 51200 x 5120 1.00 and 0.97, `stream` 0.97 and 0.92 (H200, `h200-load.json`)."""

_CLOSE = 1.1  # a takeover is known well enough between sizes as close as this: int4 costs at most so much more at the upper one
_STEPPED = 32  # up to here times are stairs (int4 on a CPU takes 4 rows at a time): halving would miss what is beyond a step
_HOPELESS = 2.5  # a path so much slower than the best is not timed often
_BEHIND = 1.5  # one that is so much slower at two sizes is not timed between them
_LEVEL = 1.15  # a path that takes so much longer may be ahead between two sizes, or on a busy GPU
_JUMPY = (_STEPPED, 512)  # rows between which GPUs' times jump: few tiles, and cuBLAS chooses others from one size to the next
_WIDE = 1.25  # of such gaps those are looked into in which the upper size is so many times the lower
_ROUNDS = 4  # halvings of a gap; three bring a factor of two below _CLOSE, noise may move the takeover once
_LEAST_SIZES = 5  # the coarsest grid of rows: 1, 32, 192, 512 and 8192 on a GPU
_ENOUGH = 16  # samples of a size and path
_PATIENCE = {"cpu": 0.1, "gpu": 0.006}  # seconds a path for more than the least of them
_BRIEF = 0.06  # the same on a CPU around takeovers that are not stairs, where paths are long

_Route = tuple[Sequence[str], Sequence[tuple[int, str]]]
"""The choices of a route, and its pieces by the times so far."""


def grid(device: torch.device, most: int = 0) -> tuple[int, ...]:
    """The rows that are timed for every shape on a device, ascending; on a GPU also `FULL` where calls have about so many, or
    more. most: the most rows of a call.
    """
    if device.type == "cpu":
        return GRID["cpu"]
    return (*GRID["gpu"], FULL) if 4 * most >= 3 * FULL else GRID["gpu"]


def time_variants(
    variants: Mapping[str, Callable[[torch.Tensor], object]],
    k: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    **options: Any,
) -> Measured:
    """Time ways to compute one product [M, k] -> [M, n], as `Search` does, whose options these are."""
    search = Search(variants, k, n, dtype, device, **options)
    search.over_grid()
    return search.around_takeovers()


@dataclass(eq=False)
class Search:
    """Times ways to compute one product [M, k] -> [M, n], by the names of `Measured.times`: over the device's grid of M, then
    between the two sizes around each takeover, until they are close. What comes between the two is `load_together`.

    orders: the routes that may be used, as `Measured.route` takes them; none: all that need no twin, and those with one twin.
    wraps: by rows, what turns the calls of one sample into what is timed, such as the replay of a graph, which a host does not
    disturb; None times the calls as they are. seconds: so long after the first size no further one is begun, beyond the
    coarsest grid that serves: some kernels are compiled for each size. most: as in `grid`.
    """

    variants: Mapping[str, Callable[[torch.Tensor], object]]
    k: int
    n: int
    dtype: torch.dtype
    device: torch.device
    orders: Sequence[Sequence[str]] = ()
    wraps: Callable[[int], Wrap | None] = lambda m: None
    seconds: float = math.inf
    most: int = 0
    found: dict[int, dict[str, Timing]] = field(default_factory=dict)
    whole: bool = True
    _spent: float = 0.0

    def over_grid(self) -> None:
        """Time the grid's sizes, the ends first."""
        started = None
        for m in _coarse_first(grid(self.device, self.most)):
            if started is not None and len(self.found) >= _LEAST_SIZES and time.perf_counter() - started > self.seconds:
                self.whole = False
                break
            self._time(m, self._behind(m) if len(self.found) >= _LEAST_SIZES else set())
            started = started or time.perf_counter()
        self._spent = time.perf_counter() - (started or time.perf_counter())

    def around_takeovers(self) -> Measured:
        """Time the sizes around takeovers, and return all times."""
        started = time.perf_counter() - self._spent
        surpassed, on_cpu = self._surpassed(), self.device.type == "cpu"
        sure: set[tuple[int, str]] = set()
        for _ in range(_ROUNDS):
            measured = _joined(self.found, self.n)
            routes = [(choices, measured.pieces(choices)) for choices in self._orders(surpassed)]
            rivals = _around_takeovers(measured, routes)
            if on_cpu:
                for m, paths in _ends(measured, routes).items():
                    if not sure.issuperset((m, path) for path in paths):
                        rivals.setdefault(m, set()).update(paths)
                sure |= {(m, path) for m, paths in rivals.items() for path in paths}
            for m in sorted(rivals.keys() | (set() if on_cpu else _contested(measured, routes))):
                if time.perf_counter() - started > self.seconds:
                    return replace(_joined(self.found, self.n), whole=False)
                left_out = set(self.variants) - rivals[m] if on_cpu else self._behind(m) | surpassed
                self._time(m, left_out, _BRIEF if on_cpu and m > _STEPPED else None)
        return replace(_joined(self.found, self.n), whole=self.whole)

    @property
    def level(self) -> dict[str, Callable[[torch.Tensor], object]]:
        """What may be the best at the most rows on a busy GPU, the best so far first."""
        times = self.found[max(self.found)]
        ordered = sorted(times, key=lambda c: times[c].min)
        return {c: self.variants[c] for c in ordered if times[c].min <= _LEVEL * times[ordered[0]].min}

    def loaded(self, times: Mapping[str, Timing]) -> None:
        """Take these for the times at the most rows. What is not among them is taken to become slower as much as they are."""
        at = self.found[max(self.found)]
        slower = max(t.min / at[c].min for c, t in times.items())
        self.found[max(self.found)] = {c: times[c] if c in times else t.times(slower) for c, t in at.items()}

    def _time(self, m: int, left_out: Collection[str], patience: float | None = None) -> None:
        near = {c: call for c, call in self.variants.items() if c not in left_out}
        before = self.found.get(m) or {c: _between(self.found, self.n, c, m) for c in left_out}
        times = time_rows(near, m, self.k, self.dtype, self.device, wrap=self.wraps(m), patience=patience)
        self.found[m] = {**before, **{c: min(t, before.get(c, t), key=lambda t: t.min) for c, t in times.items()}}

    def _orders(self, surpassed: Collection[str]) -> Sequence[Sequence[str]]:
        return self.orders or _usual(_joined(self.found, self.n), surpassed)

    def _surpassed(self) -> set[str]:
        return _surpassed(_joined(self.found, self.n), partial(twin.nbytes, n=self.n, k=self.k, device=self.device))

    def _behind(self, m: int) -> set[str]:
        """What is far from the best at the sizes timed on either side of `m`: it is taken to be between them there. On a CPU
        the best of each route counts, as a twin may be a tenth of what its weight takes without; on a GPU that of all.
        """
        around = _around(self.found, m)
        orders = self._orders(self._surpassed()) if self.device.type == "cpu" else [list(self.variants)]
        least = [(order, at, min(at[c].min for c in order)) for order in orders for at in around]
        near = {c for order, at, best in least for c in order if at[c].min <= _BEHIND * best}
        return set(self.variants) - near


def load_together(searches: Iterable[Search], seconds: float) -> None:
    """Time what may be the best at the most rows on a busy GPU, for all weights of a model without a rest between them: who has
    so many rows has them again and again. seconds: for each weight and path (`under_load`).
    """
    calls: dict[tuple[Search, str], Callable[[], object]] = {}
    for search in searches:
        if search.whole and len(level := search.level) > 1:
            x = torch.randn(max(search.found), search.k, device=search.device).to(search.dtype)
            calls |= {(search, path): partial(call, x) for path, call in level.items()}
    if not calls:
        return
    times = under_load(calls, device=next(iter(calls))[0].device, seconds=seconds)
    for search in dict.fromkeys(search for search, _ in calls):
        search.loaded({path: t for (of, path), t in times.items() if of is search})


def _around(found: Mapping[int, dict[str, Timing]], m: int) -> list[dict[str, Timing]]:
    """The times at the sizes on either side of one."""
    return [found[max(size for size in found if size < m)], found[min(size for size in found if size > m)]]


def _between(found: Mapping[int, dict[str, Timing]], n: int, choice: str, m: int) -> Timing:
    """What a path should take at a size, by its times on either side; as sure as they are."""
    seconds = _joined(found, n).time_at(choice, m)
    return Timing(seconds, seconds, seconds, max(at[choice].spread for at in _around(found, m)))


def _coarse_first(sizes: Sequence[int]) -> list[int]:
    """The same sizes: both ends, then always the middle of the widest gap."""
    at = [0, len(sizes) - 1]
    while len(at) < len(sizes):
        ordered = sorted(at)
        low, high = max(itertools.pairwise(ordered), key=lambda gap: gap[1] - gap[0])
        at.append((low + high) // 2)
    return [sizes[i] for i in at]


def _joined(found: Mapping[int, dict[str, Timing]], n: int) -> Measured:
    ms = tuple(sorted(found))
    return Measured(ms, {c: tuple(found[m][c] for m in ms) for c in found[1]}, n)


def time_rows(
    variants: Mapping[str, Callable[[torch.Tensor], object]],
    m: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    wrap: Wrap | None = None,
    enough: int = _ENOUGH,
    patience: float | None = None,
) -> dict[str, Timing]:
    """Time all variants with m rows, interleaved; `enough` samples each, where they take no longer than `patience` (seconds a
    path; None: a start-up's).
    """
    x = torch.randn(m, k, dtype=torch.float32, device=device).to(dtype)
    if device.type == "cpu":
        # Every call has a clock of its own, so that one disturbed call does not spoil the others.
        calls: dict[str, Callable[[], object]] = {name: partial(call, x) for name, call in variants.items()}
        longest = (patience or _PATIENCE["cpu"]) * len(calls)
        return interleaved(calls, device=device, enough=enough, patience=longest, hopeless=_HOPELESS)
    # Calls are repeated inside one sample: a clock around a short one measures the clock, one weight alone would stay in the
    # caches, and where the host launches each, the GPU would wait for it (`stream` twice).
    inner = max(1, min(16, (8192 if wrap is None else 2048) // m))
    runs = {name: _repeat(call, x, inner) for name, call in variants.items()}
    calls = {name: run if wrap is None else wrap(run) for name, run in runs.items()}
    # What is launched from here is only as fast as the host lets it be.
    longest = (patience or (_PATIENCE["gpu"] if wrap is None else 0.0)) * len(calls)
    times = interleaved(calls, device=device, enough=enough, patience=longest, hopeless=_HOPELESS)
    return {name: t.times(1 / inner) for name, t in times.items()}


def _surpassed(measured: Measured, nbytes: Callable[[str], int]) -> set[str]:
    """Exact kinds of twins that no plan takes: another one is no larger, and faster at every size."""
    kinds = [c for c in measured.times if c.startswith("twin:") and c.removeprefix("twin:") not in twin.LOSSY]

    def surpasses(a: str, b: str) -> bool:
        smaller = nbytes(a.removeprefix("twin:")) <= nbytes(b.removeprefix("twin:"))
        return smaller and all(x.min < y.min for x, y in zip(measured.times[a], measured.times[b], strict=True))

    return {b for b in kinds if any(surpasses(a, b) for a in kinds if a != b)}


def _usual(measured: Measured, surpassed: Collection[str]) -> list[tuple[str, ...]]:
    """The routes of a weight without a twin, and with each that a plan may take."""
    twins = [c for c in measured.times if c.startswith("twin:") and c not in surpassed]
    return [measured.plain, *map(measured.with_twin, twins)]


def _around_takeovers(measured: Measured, routes: Sequence[_Route]) -> dict[int, set[str]]:
    """Sizes to time in the gaps in which one path takes over from another, on any of these routes, and the paths that do."""
    rivals: dict[int, set[str]] = {}
    for _, pieces in routes:
        for (_, before_it), (start, path) in itertools.pairwise(pieces):
            before, ms = measured.ms[measured.ms.index(start) - 1], set()
            if start <= _STEPPED:
                octave = 1 << (start - 1).bit_length() - 1
                # Stairs begin behind a multiple of 4 or more; where there are none, a takeover is between two of these.
                ms |= set(range(octave + 1, min(4 * octave, _STEPPED) + 1, 4 if octave > 2 else 1))
                ms |= {before + 2} if start - before == 4 else set()
            elif start > before * _CLOSE:
                ms.add(round(math.sqrt(before * start)))
            for m in ms - set(measured.ms):
                rivals.setdefault(m, set()).update((before_it, path))
    return rivals


def _ends(measured: Measured, routes: Sequence[_Route]) -> dict[int, set[str]]:
    """The sizes on either side of each takeover on these routes where few calls of its paths were timed, and these paths: one
    that was disturbed there would move it by a gap of the grid.
    """
    rivals: dict[int, set[str]] = {}
    for _, pieces in routes:
        for (_, before_it), (start, path) in itertools.pairwise(pieces):
            at = measured.ms.index(start)
            for m in (at - 1, at) if start > _STEPPED else ():
                if any(measured.times[c][m].doubt is None for c in (before_it, path)):
                    rivals.setdefault(measured.ms[m], set()).update((before_it, path))
    return rivals


def _contested(measured: Measured, routes: Sequence[_Route]) -> set[int]:
    """Sizes to time in the gaps in which nothing takes over, but another path is level at both ends: it may be ahead between.

    A twin of 4096 x 4096 on an H200 takes 12.3 us at 91 and 108 rows, 15.4 at 112, 14.0 at 128, 15.6 at 152 and 19.3 at 160,
    where `fused` takes 12.7, 14.4, 14.5, 14.5, 17.2 and 17.3.
    """
    ms: set[int] = set()
    for choices, pieces in routes:
        serving = [next(c for start, c in reversed(pieces) if start <= m) for m in measured.ms]
        level = [
            {c for c in choices if measured.times[c][at].min <= _LEVEL * measured.times[served][at].min}
            for at, served in enumerate(serving)
        ]
        for at, (low, high) in enumerate(itertools.pairwise(measured.ms)):
            wide = _JUMPY[0] <= low and high <= _JUMPY[1] and high > low * _WIDE
            if wide and serving[at] == serving[at + 1] and level[at] & level[at + 1] - {serving[at]}:
                ms.add(round(math.sqrt(low * high)))
    return ms


def _repeat(call: Callable[[torch.Tensor], object], x: torch.Tensor, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call(x)

    return run
