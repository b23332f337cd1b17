"""`Crossovers`: measured times of every path per shape, from this process or a cache. No constant decides a path."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from twinweight import cache, twin
from twinweight.graphs import Graphs, Wrap
from twinweight.kernels import backend_for, int4_path, int8
from twinweight.kernels.launch import compile_together
from twinweight.kernels.prepared import KernelWeight
from twinweight.measured import Measured
from twinweight.paths import Path
from twinweight.timing import Timing, interleaved
from twinweight.weight import Int4Weight

GRID = {
    "cpu": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "gpu": (1, 8, 16, 32, 64, 112, 160, 256, 320, 512, 640, 1024, 2048, 8192),
}
"""Rows that are timed for every shape; between two of them a takeover is searched for. A GPU takes 8 rows or more at once, and
kernels take tiles of 128 or 256: at so many rows such a kernel is at its best, and a twin that is 20 % ahead from 129 on seemed
level with it at 128 and 256 (H200, 14336 x 4096). 256 is timed all the same: a twin of 10240 x 5120 is a sixth faster there and
no more than level at 192 and 384, so that a search between 160 and 320 did not find it. So is 512, where Machete is up to 11 %
ahead of `fused`, and up to 26 % behind at 384, and 112, where a twin of 4096 x 4096 is 14 % ahead of `fused`, and not at 64 and
160."""

CPU_ELEMENTS = 8 << 20
"""On the CPU a slice of rows with about so many weights stands for the weight: time per row does not depend on N there. With
2 << 20 the 40 us that every call costs counted double at M=4 (two cores, 14336 x 4096)."""

_CLOSE = 1.1  # a takeover is known well enough between sizes as close as this: int4 costs at most so much more at the upper one
_STEPPED = 32  # up to here times are stairs (int4 on a CPU takes 4 rows at a time): halving would miss what is beyond a step
_HOPELESS = 2.5  # a path so much slower than the best is not timed often
_BEHIND = 1.5  # one that is so much slower at two sizes is not timed between them
_LEVEL = 1.15  # a path that takes so much longer may be ahead between two sizes
_JUMPY = (_STEPPED, 512)  # rows between which GPUs' times jump: few tiles, and cuBLAS chooses others from one size to the next
_WIDE = 1.25  # of such gaps those are looked into in which the upper size is so many times the lower
_ROUNDS = 4  # halvings of a gap; three bring a factor of two below _CLOSE, noise may move the takeover once
_LAUNCHED = 1 << 34  # products up to which a kernel may be done before the next is launched: 34 GFLOP, 45 us on an H200
_LEAST_SIZES = 5  # the coarsest grid of rows: 1, 32, 256, 1024 and 8192 on a GPU
_ENOUGH = 16  # samples of a size and path
_PATIENCE = {"cpu": 0.1, "gpu": 0.006}  # seconds a path for more than the least of them


def grid(device: torch.device) -> tuple[int, ...]:
    """The rows that are timed for every shape on a device, ascending."""
    return GRID["cpu" if device.type == "cpu" else "gpu"]


def rotation(device: torch.device, nbytes: int) -> int:
    """Copies of a weight of `nbytes` that a timing cycles through, so that caches do not answer for memory.

    GPUs have L2 caches of up to 126 MB: with 2 copies of a 33 MB twin on an H200 (60 MB), the twin seemed to win at M=1.
    """
    total, most = (96 << 20, 6) if device.type == "cpu" else (256 << 20, 32)
    return max(1, min(most, total // max(1, nbytes)))


@dataclass(frozen=True)
class Shape:
    """What a measurement holds for: two weights of equal `Shape` run at equal speed."""

    n: int
    k: int
    group_size: int
    symmetric: bool
    act_order: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> dict[str, object]:
        """What the cache knows it by; the device has a name of its own there."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("dtype", "device")}
        return {"engine": "embedded", **fields, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass
class Crossovers:
    """The measurements, by shape: a shape is measured once on a machine, and its times are kept in the cache.

    store: where they are kept; None for nowhere. The default follows TWINWEIGHT_CACHE.
    """

    measured: dict[Shape, Measured] = field(default_factory=dict)
    store: cache.Cache | None = field(default_factory=cache.default)

    def get(self, shape: Shape, *, with_twins: bool = True, lossy: Sequence[str] = ()) -> Measured:
        """The measurement of a shape. Without twins only int4 and fused are timed (mode `off`), and not at all where there is
        one of them. lossy: kinds of 8-bit twins (`twin.LOSSY`) to time besides.
        """
        found, needed = self.measured.get(shape), set(choices_of(shape, with_twins=with_twins, lossy=lossy))
        if found is None or not needed <= set(found.times):
            found = self._kept(shape, needed) or self.measure(shape, with_twins=with_twins, lossy=lossy)
        self.measured[shape] = found
        return found

    def measure(self, shape: Shape, *, with_twins: bool = True, lossy: Sequence[str] = ()) -> Measured:
        """Measure a shape anew, whatever is known, and keep that."""
        found = self.measured[shape] = measure(shape, with_twins=with_twins, lossy=lossy)
        if self.store is not None and len(found.times) > 1:
            self.store.write(shape.key, shape.device, found)
        return found

    def _kept(self, shape: Shape, needed: set[str]) -> Measured | None:
        if self.store is None or len(needed) < 2:
            return None
        found = self.store.read(shape.key, shape.device)
        return found if found is not None and needed <= set(found.times) else None


def twin_choice(kind: str | torch.dtype) -> str:
    """The name of a twin of this kind in `Measured.times`; a dtype is the dense kind of that dtype."""
    return "twin:" + str(kind).removeprefix("torch.")


def without_twin(device: torch.device) -> list[str]:
    """The names of the paths that need no twin, in the order in which they may take over as rows grow."""
    return [Path(p).name.lower() for p in backend_for(device).paths_without_twin()]


def choices_of(shape: Shape, *, with_twins: bool = True, lossy: Sequence[str] = ()) -> list[str]:
    """The choices that exist for a shape: the paths without a twin, then the kinds a twin may have. Without twins those that
    mode `off` may use: nothing is expanded there.
    """
    plain = without_twin(shape.device)
    if not with_twins:
        return [c for c in plain if c != "stream"]
    return [*plain, *map(twin_choice, (*twin.dense_kinds(shape.dtype, shape.device), *lossy))]


def measure(shape: Shape, *, with_twins: bool = True, lossy: Sequence[str] = ()) -> Measured:
    """Time every path of one shape on random data. About a second on a CPU; temporaries stay below 256 MiB there."""
    names = choices_of(shape, with_twins=with_twins, lossy=lossy)
    if len(names) == 1:
        return Measured((1,), {names[0]: (Timing(0.0, 0.0, 0.0),)}, shape.n)
    n = shape.n
    if shape.device.type == "cpu":
        n = min(n, max(64, CPU_ELEMENTS // shape.k // 64 * 64))
    calls = variants(shape, n, names)
    compile_first(calls.values(), shape.k, shape.dtype, shape.device)
    return time_variants(calls, shape.k, n, shape.dtype, shape.device, wraps=by_graphs(shape))


def by_graphs(shape: Shape) -> Callable[[int], Wrap | None]:
    """How calls of so many rows are timed: short ones as the replay of a CUDA graph. A host takes longer to launch them than a
    GPU to compute them, and on a slow one a twin won because `F.linear` is launched faster (4096 x 4096 on an H200: at one row,
    which takes 6.5 us by int4 and 13.6 by the twin, and at 65 to 160 rows).
    """
    if shape.device.type != "cuda":
        return lambda m: None
    with torch.cuda.device(shape.device):
        graphs = Graphs()
    return lambda m: graphs.replayed if m * shape.n * shape.k <= _LAUNCHED else None


def compile_first(calls: Iterable[Callable[[torch.Tensor], object]], k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile our kernels for all rows of the device's grid at once; on a CPU there are none. Tiles depend on rows."""
    if device.type != "cpu":
        rows = itertools.product(calls, grid(device))
        compile_together(partial(call, torch.empty(m, k, dtype=dtype, device=device)) for call, m in rows)


def time_variants(
    variants: Mapping[str, Callable[[torch.Tensor], object]],
    k: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    orders: Sequence[Sequence[str]] = (),
    wraps: Callable[[int], Wrap | None] = lambda m: None,
    seconds: float = math.inf,
) -> Measured:
    """Time ways to compute one product [M, k] -> [M, n], by the names of `Measured.times`: over the device's grid of M, then
    between the two sizes around each takeover, until they are close.

    orders: the routes that may be used, as `Measured.route` takes them; none: all that need no twin, and those with one twin.
    wraps: by rows, what turns the calls of one sample into what is timed, such as the replay of a graph, which a host does not
    disturb; None times the calls as they are. seconds: so long after the first size no further one is begun, beyond the
    coarsest grid that serves: some kernels are compiled for each size.
    """
    found: dict[int, dict[str, Timing]] = {}
    started = math.inf

    def time_size(m: int, left_out: Collection[str]) -> None:
        near = {c: call for c, call in variants.items() if c not in left_out}
        others = {c: Timing(*[_joined(found, n).time_at(c, m)] * 3) for c in left_out}
        found[m] = {**time_rows(near, m, k, dtype, device, wrap=wraps(m)), **others}

    for m in _coarse_first(grid(device)):
        if len(found) >= _LEAST_SIZES and time.perf_counter() - started > seconds:
            break
        time_size(m, _behind(found, m) if device.type != "cpu" and len(found) >= _LEAST_SIZES else ())
        started = min(started, time.perf_counter())
    surpassed = _surpassed(_joined(found, n), partial(twin.nbytes, n=n, k=k, device=device))
    for _ in range(_ROUNDS):
        measured = _joined(found, n)
        routes = orders or _usual(measured, surpassed)
        looked_into = _contested(measured, routes) if device.type != "cpu" else set()
        for m in sorted(_around_takeovers(measured, routes) | looked_into):
            if time.perf_counter() - started > seconds:
                break
            time_size(m, _behind(found, m) | surpassed)
    return _joined(found, n)


def _behind(found: Mapping[int, dict[str, Timing]], m: int) -> set[str]:
    """What is far from the best at the sizes timed on either side of `m`: it is taken to be between them there."""
    below, above = (found[size] for size in (max(s for s in found if s < m), min(s for s in found if s > m)))
    return {c for c in below if all(at[c].min > _BEHIND * min(t.min for t in at.values()) for at in (below, above))}


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
    longest = (patience or _PATIENCE["gpu"]) * len(calls) if wrap is None else 0.0
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


def _around_takeovers(measured: Measured, orders: Sequence[Sequence[str]]) -> set[int]:
    """Sizes to time in the gaps in which one path takes over from another, on any of these routes."""
    ms: set[int] = set()
    for choices in orders:
        for start, _ in measured.pieces(choices)[1:]:
            before = measured.ms[measured.ms.index(start) - 1]
            if start <= _STEPPED:
                octave = 1 << (start - 1).bit_length() - 1
                # Stairs begin behind a multiple of 4 or more; where there are none, a takeover is between two of these.
                ms |= set(range(octave + 1, min(4 * octave, _STEPPED) + 1, 4 if octave > 2 else 1))
                ms |= {before + 2} if start - before == 4 else set()
            elif start > before * _CLOSE:
                ms.add(round(math.sqrt(before * start)))
    return ms - set(measured.ms)


def _contested(measured: Measured, orders: Sequence[Sequence[str]]) -> set[int]:
    """Sizes to time in the gaps in which nothing takes over, but another path is level at both ends: it may be ahead between.

    A twin of 4096 x 4096 on an H200 takes 12.3 us at 91 and 108 rows, 15.4 at 112, 14.0 at 128, 15.6 at 152 and 19.3 at 160,
    where `fused` takes 12.7, 14.4, 14.5, 14.5, 17.2 and 17.3.
    """
    ms: set[int] = set()
    for choices in orders:
        pieces = measured.pieces(choices)
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


def variants(shape: Shape, n: int, names: Sequence[str]) -> dict[str, Callable[[torch.Tensor], object]]:
    """One callable a choice, on weights [n, K] of random values, enough of them that caches do not answer for memory."""
    backend = backend_for(shape.device)
    weight = _random_weight(shape, n)
    first = backend.prepare(weight)
    kernels = [first, *(_copy(first) for _ in range(rotation(shape.device, weight.nbytes) - 1))]

    def rotating(count: int, call: Callable[[int, torch.Tensor], object]) -> Callable[[torch.Tensor], object]:
        state = {"at": 0}

        def run(x: torch.Tensor) -> object:
            state["at"] = (state["at"] + 1) % count
            return call(state["at"], x)

        return run

    found: dict[str, Callable[[torch.Tensor], object]] = {}
    for name in names:
        if not name.startswith("twin:"):
            path = Path[name.upper()]
            found[name] = rotating(len(kernels), lambda i, x, path=path: int4_path(path, x, kernels[i], None))  # type: ignore[misc]
            continue
        kind = name.removeprefix("twin:")
        count = rotation(shape.device, twin.nbytes(kind, n, shape.k, shape.device))
        twins = [twin.empty(kind, n, shape.k, shape.device) for _ in range(count)]
        for one in twins:
            twin.fill(kernels[0], *one)
        if kind == "int8" and n < shape.n:
            slices = [int8_slice(data, scales, n / shape.n) for data, scales in twins if scales is not None]
            found[name] = rotating(count, lambda i, x, slices=slices: slices[i](x))  # type: ignore[misc]
            continue
        found[name] = rotating(count, lambda i, x, twins=twins: twin.linear(x, twins[i][0], twins[i][1], None))  # type: ignore[misc]
    return found


def _copy(w: KernelWeight) -> KernelWeight:
    zeros = w.zeros.clone() if w.zeros is not None else None
    return dataclasses.replace(w, packed=w.packed.clone(), scales=w.scales.clone(), zeros=zeros)


def int8_slice(data: torch.Tensor, scales: torch.Tensor, share: float) -> Callable[[torch.Tensor], object]:
    """What an int8 twin takes for a share of its rows: their product, and that share of rounding the activations, which a call
    does once however many rows it multiplies them with.
    """
    rounded: list[torch.Tensor] = []

    def run(x: torch.Tensor) -> object:
        if not rounded or rounded[0] is not x:
            rounded[:] = [x, *int8.quantize_rows(x)]
        int8.quantize_rows(x[: math.ceil(len(x) * share)])
        return int8.multiply(rounded[1], rounded[2], data, scales, None, x.dtype)

    return run


def _random_weight(shape: Shape, n: int) -> Int4Weight:
    generator = torch.Generator(shape.device).manual_seed(0)
    words = torch.randint(
        -(2**31), 2**31 - 1, (n, math.ceil(shape.k / 8)), generator=generator, device=shape.device, dtype=torch.int32
    )
    groups = shape.k // shape.group_size
    scales = (torch.rand(n, groups, generator=generator, device=shape.device) * 0.01 + 0.001).to(shape.dtype)
    zeros = None
    if not shape.symmetric:
        zeros = torch.randint(4, 12, (n, groups), generator=generator, device=shape.device, dtype=torch.uint8)
    g_idx = None
    if shape.act_order:
        order = torch.randperm(shape.k, generator=generator, device=shape.device)
        g_idx = (order // shape.group_size).to(torch.int32)
    return Int4Weight(words, scales, zeros, g_idx, shape.group_size, shape.k)
