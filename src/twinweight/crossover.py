"""`Crossovers`: measured times of every path per shape, from this process or a cache. No constant decides a path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from twinweight import cache, twin
from twinweight.graphs import Graphs, Wrap
from twinweight.kernels import backend_for, gpu, int4_path, int8
from twinweight.kernels.launch import compile_together
from twinweight.kernels.prepared import KernelWeight
from twinweight.measured import Measured
from twinweight.paths import Path
from twinweight.search import grid, time_variants
from twinweight.timing import Timing
from twinweight.weight import Int4Weight

CPU_ELEMENTS = 8 << 20
"""On the CPU a slice of rows with about so many weights stands for the weight: time per row does not depend on N there. With
2 << 20 the 40 us that every call costs counted double at M=4 (two cores, 14336 x 4096)."""

_LAUNCHED = 1 << 34  # products up to which a kernel may be done before the next is launched: 34 GFLOP, 45 us on an H200


def rotation(device: torch.device, nbytes: int) -> int:
    """Copies of a weight of `nbytes` that a timing cycles through, so that caches do not answer for memory.

    GPUs have L2 caches of up to 126 MB: with 2 copies of a 33 MB twin on an H200 (60 MB), the twin seemed to win at M=1. Six
    copies of a 6 MB twin stay in the last cache of a Xeon (480 MB, shared): 230 us by themselves, 330 to 400 beside others.
    """
    total, most = (96 << 20, 32) if device.type == "cpu" else (256 << 20, 32)
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
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dtype", "device")}
        return {"engine": "embedded", **known, "dtype": str(self.dtype).removeprefix("torch.")}


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

    def compile(self, shapes: Iterable[Shape]) -> None:
        """Compile what measuring these will launch, where they are not known: one after the other, each would wait for the
        largest of its kernels. On a CPU there are none.
        """
        unknown = (s for s in shapes if s.device.type == "cuda" and s not in self.measured)
        new = [s for s in unknown if self._kept(s, {"int4", "fused"}) is None]
        for _, ours in itertools.groupby(new, key=lambda shape: shape.device):
            _compile(list(ours))

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
    if shape.device.type == "cuda":
        _compile([shape])
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


def _compile(shapes: Sequence[Shape]) -> None:
    """Compile what measuring these launches on their GPU: tiles depend on rows."""
    device = shapes[0].device
    rows = dict.fromkeys((Path.INT4, Path.FUSED), grid(device))
    with torch.cuda.device(device):
        compile_together(
            call for s in shapes for call in gpu.launches(s.n, s.k, s.group_size, s.dtype, rows, symmetric=s.symmetric)
        )


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
        twin.fill(kernels[0], *twins[0])
        for other in twins[1:]:
            for values, filled in zip(other, twins[0], strict=True):
                if values is not None and filled is not None:
                    values.copy_(filled)  # an 8-bit twin takes several times as long to fill
        if kind == "int8" and n < shape.n:
            slices = [int8_slice(data, scales, n / shape.n) for data, scales in twins if scales is not None]
            found[name] = rotating(count, lambda i, x, slices=slices: slices[i](x))  # type: ignore[misc]
            continue
        found[name] = rotating(count, lambda i, x, twins=twins: twin.linear(x, twins[i][0], twins[i][1], None))  # type: ignore[misc]
    return found


def _copy(w: KernelWeight) -> KernelWeight:
    zeros = w.zeros.clone() if w.zeros is not None else None
    return replace(w, packed=w.packed.clone(), scales=w.scales.clone(), zeros=zeros)


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
