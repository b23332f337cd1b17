"""`Crossovers`: measured times of every path per shape, and the routes that follow from them. No constant decides a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import torch

from twinweight.kernels import backend_for, dense_linear
from twinweight.paths import Path, Route
from twinweight.timing import Timing, interleaved
from twinweight.weight import Int4Weight

_GRID = {
    "cpu": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "gpu": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
}
CPU_ELEMENTS = 2 << 20  # on the CPU a slice of rows stands for the weight: time per row does not depend on N there


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


@dataclass(frozen=True)
class Measured:
    """Seconds a call at each number of rows in `ms`, per choice: "int4", "fused", or "twin:<dtype>".

    n: output features that were timed; the weight's own, or fewer where a slice of its rows stands for it.
    """

    ms: tuple[int, ...]
    times: dict[str, tuple[Timing, ...]]
    n: int

    def route(self, choices: Sequence[str]) -> Route:
        """The route of least total slowdown among those that move one way, from decode paths to dense ones.

        choices: in the order in which they may take over as rows grow. A path starts at a measured size where it beats the
        one before by more than the measured spread of both, and the total over all sizes decides where, so that noise at one
        size neither flips a choice nor moves it below what was seen. Disturbances only ever add time: the least sample stands
        for a path.
        """
        costs = [[math.log(max(t.min, 1e-9)) for t in self.times[c]] for c in choices]
        best: tuple[float, tuple[int, ...]] = (math.inf, ())
        for cuts in combinations_with_replacement(range(len(self.ms) + 1), len(choices) - 1):
            edges = (0, *cuts, len(self.ms))
            if all(self._wins(choices, c, edges) for c in range(1, len(choices))):
                total = sum(sum(costs[c][edges[c] : edges[c + 1]]) for c in range(len(choices)))
                # On a tie the later takeover: int4 costs no memory.
                best = min(best, (total, tuple(-e for e in edges)))
        edges = tuple(-e for e in best[1])
        used = [c for c in range(len(choices)) if edges[c] < edges[c + 1]]
        starts = (0, *(self.ms[edges[c]] for c in used[1:]))
        return Route(starts, tuple(_path_of(choices[c]) for c in used))

    def _wins(self, choices: Sequence[str], c: int, edges: tuple[int, ...]) -> bool:
        """Whether choice c, where it starts, beats the nearest earlier choice that is used; a start at the first size is
        free.
        """
        at = edges[c]
        if at == edges[c + 1] or at == 0:
            return True
        before = next(b for b in range(c - 1, -1, -1) if edges[b] < edges[b + 1])
        new, old = self.times[choices[c]][at], self.times[choices[before]][at]
        return new.min * (1 + new.spread + old.spread) < old.min

    def saved(self, choice: str, without: Iterable[str]) -> float:
        """Seconds that `choice` saves at the largest measured number of rows, against the best of `without`."""
        return min(self.times[c][-1].min for c in without) - self.times[choice][-1].min


@dataclass
class Crossovers:
    """The measurements, by shape; a shape is measured once, when it is first asked for."""

    measured: dict[Shape, Measured] = field(default_factory=dict)

    def get(self, shape: Shape, *, with_twins: bool = True) -> Measured:
        """The measurement of a shape. Without twins only the paths that need none are timed, and not at all where there is
        one.
        """
        found = self.measured.get(shape)
        if found is None or (with_twins and not any(c.startswith("twin:") for c in found.times)):
            found = self.measured[shape] = measure(shape, with_twins=with_twins)
        return found


def twin_choice(dtype: torch.dtype) -> str:
    """The name of a twin of this dtype in `Measured.times`."""
    return "twin:" + str(dtype).removeprefix("torch.")


def without_twin(device: torch.device) -> list[str]:
    """The names of the paths that need no twin."""
    return [Path(p).name.lower() for p in backend_for(device).paths_without_twin()]


def measure(shape: Shape, *, with_twins: bool = True, repeats: int = 3) -> Measured:
    """Time every path of one shape on random data. Well under a second on a CPU; temporaries stay below 256 MiB there."""
    names = without_twin(shape.device)
    if not with_twins and len(names) == 1:
        zero = Timing(0.0, 0.0, 0.0)
        return Measured((1,), {names[0]: (zero,)}, shape.n)
    n = shape.n
    if shape.device.type == "cpu":
        n = min(n, max(64, CPU_ELEMENTS // shape.k // 64 * 64))
    return time_variants(_variants(shape, n, with_twins), shape.k, n, shape.dtype, shape.device, repeats=repeats)


def time_variants(
    variants: Mapping[str, Callable[[torch.Tensor], object]],
    k: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    repeats: int = 3,
    wrap: Callable[[Callable[[], None]], Callable[[], object]] = lambda run: run,
) -> Measured:
    """Time ways to compute one product [M, k] -> [M, n], by the names of `Measured.times`, over the device's grid of M.

    wrap: turns the calls of one sample into what is timed, such as the replay of a graph.
    """
    grid = _GRID["cpu" if device.type == "cpu" else "gpu"]
    times: dict[str, list[Timing]] = {name: [] for name in variants}
    for m in grid:
        x = torch.randn(m, k, dtype=torch.float32, device=device).to(dtype)
        # Short calls are repeated inside one sample: a clock around a single one of them measures the clock, and one weight
        # alone would stay in the caches.
        inner = max(1, min(16, (16 if device.type == "cpu" else 2048) // m))
        calls = {name: wrap(_repeat(call, x, inner)) for name, call in variants.items()}
        for name, timing in interleaved(calls, device=device, repeats=repeats).items():
            times[name].append(Timing(timing.median / inner, timing.min / inner, timing.max / inner))
    return Measured(grid, {name: tuple(t) for name, t in times.items()}, n)


def _repeat(call: Callable[[torch.Tensor], object], x: torch.Tensor, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call(x)

    return run


def _variants(shape: Shape, n: int, with_twins: bool) -> dict[str, Callable[[torch.Tensor], object]]:
    """One callable a choice, on weights of random values."""
    backend = backend_for(shape.device)
    weight = _random_weight(shape, n)
    copies = rotation(shape.device, weight.nbytes)
    kernels = [backend.prepare(weight) for _ in range(copies)]

    def rotating(count: int, call: Callable[[int, torch.Tensor], object]) -> Callable[[torch.Tensor], object]:
        state = {"at": 0}

        def run(x: torch.Tensor) -> object:
            state["at"] = (state["at"] + 1) % count
            return call(state["at"], x)

        return run

    variants: dict[str, Callable[[torch.Tensor], object]] = {}
    for name in without_twin(shape.device):
        linear = backend.int4_linear if name == "int4" else backend.fused_linear
        variants[name] = rotating(len(kernels), lambda i, x, linear=linear: linear(x, kernels[i], None))  # type: ignore[misc]
    for dtype in backend.twin_dtypes(shape.dtype) if with_twins else ():
        count = rotation(shape.device, n * shape.k * dtype.itemsize)
        twins = [backend.empty_twin(n, shape.k, dtype, shape.device) for _ in range(count)]
        for twin in twins:
            backend.expand(kernels[0], twin)
        variants[twin_choice(dtype)] = rotating(count, lambda i, x, twins=twins: dense_linear(x, twins[i], None))  # type: ignore[misc]
    return variants


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


def _path_of(choice: str) -> Path:
    return Path.TWIN if choice.startswith("twin:") else Path[choice.upper()]
