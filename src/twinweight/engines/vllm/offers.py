"""What a layer in vLLM could hold besides its weight, and what its times make of that: the planner's `Offer`s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from twinweight import twin
from twinweight.crossover import twin_choice
from twinweight.engines.vllm import own
from twinweight.engines.vllm.kinds import dense_kind, most_rows
from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.measured import Costs, Form, Measured
from twinweight.paths import Path, Route
from twinweight.plan import MARGIN, Offer, TwinOption
from twinweight.workload import Workload

INT4 = "int4"
OWN = "own"
"""The inner kernel, and our int4 kernel on a copy of the weight in our layout (`own`)."""

_TURNS = 6
_ORDER = ((INT4, Path.INNER), (OWN, Path.INT4), *(("fused", Path.FUSED), (INT4, Path.INNER)) * _TURNS)
"""In which order paths may take over on a GPU where there is an own copy. Some inner kernels are better with few rows, others
with hundreds, and then where those fill their tiles (Machete: at 512, from 1024 on): theirs may be any parts. There are as many
turns as no weight has needed: 51200 x 5120 by Machete at 98 to 270, 405 to 540 and from 911 on could have no `fused` at 16384
with three of them, where steps take 0.97 times as long by it (`h200-vllm-routes.json`).
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


def forms_of(kernel: Wrapped, lossy: Sequence[str]) -> tuple[Form, ...]:
    """What a layer could have: twins, an own copy, or both; an output head, whose calls have few rows, no twin."""
    device, kinds = kernel.device, () if most_rows(kernel) else (dense_kind(kernel), *lossy)
    twins = {kind: twin.nbytes(kind, kernel.n, kernel.k, device) for kind in kinds}
    copy = own.nbytes(kernel) if own.can_have(kernel) else None
    return forms(copy, twins, _ORDER if device.type != "cpu" else ((OWN, Path.INT4), (INT4, Path.INNER)))


def forms(copy: int | None, twins: Mapping[str, int], order: Sequence[tuple[str, Path]] = _ORDER) -> tuple[Form, ...]:
    """As `forms_of`. copy: bytes of an own copy, None where there can be none; twins: kind -> bytes; order: the choices of a
    copy and their paths, in the order in which they may take over. The inner kernel may come back behind a twin: on a CPU with
    AMX a twin is ahead for up to some 64 rows, and no more.
    """
    alone = [Form(kind, nbytes, (INT4, twin_choice(kind), INT4)) for kind, nbytes in twins.items()]
    if copy is None:
        return tuple(alone)
    ways, taken = zip(*order, ("stream", Path.STREAM), strict=True)
    both = [
        Form(f"{OWN}+{kind}", copy + nbytes, (*ways, twin_choice(kind), INT4), (*taken, Path.TWIN, Path.INNER))
        for kind, nbytes in twins.items()
    ]
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
    offered, most = forms_of(kernel, lossy), most_rows(kernel)
    if measured is not None:
        return costs(measured, offered, kernel.n, least, on_gpu=kernel.device.type != "cpu", most=most, layers=layers)
    given = tuple(f for f in offered if not f.paths) if rows is not None else ()
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
