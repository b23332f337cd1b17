"""`Measured`: times of every path of one kind of weight by number of rows, the route that follows, and what a twin saves."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twinweight.paths import Path, Route
from twinweight.plan import MARGIN, TwinOption
from twinweight.timing import Timing
from twinweight.workload import Workload

_PLAIN = ("int4", "fused", "stream")
"""Paths without a twin, in the order in which they may take over as rows grow."""


def path_of(choice: str) -> Path:
    """The path of a choice: "int4", "fused", "stream", or "twin:<dtype>"."""
    return Path.TWIN if choice.startswith("twin:") else Path[choice.upper()]


@dataclass(frozen=True)
class Measured:
    """Seconds a call at each number of rows in `ms` (ascending), per choice.

    n: output features that were timed; the weight's own, or fewer where a slice of its rows stands for it. whole: whether no
    time limit cut it short; what is read back is. failed: choices that do not run here.
    """

    ms: tuple[int, ...]
    times: dict[str, tuple[Timing, ...]]
    n: int
    whole: bool = True
    failed: tuple[str, ...] = ()

    def tried(self, choices: Collection[str]) -> bool:
        """Whether all of these were timed, or found not to run."""
        return {*choices} <= {*self.times, *self.failed}

    @property
    def plain(self) -> tuple[str, ...]:
        """The choices that need no twin, in the order in which they may take over."""
        return tuple(c for c in _PLAIN if c in self.times)

    def with_twin(self, choice: str) -> tuple[str, ...]:
        """The choices of a weight with this twin, in that order. `fused` may come back twice: a dense GEMM is ahead of it where
        the rows fill tiles of the one and not of the other (H200, 4096 x 4096: up to 108 rows, at 152, and from 170 on).
        """
        back = ("fused", choice) if "fused" in self.times else ()
        return (*self.plain, choice, *back, *back)

    def time_at(self, choice: str, m: int) -> float:
        """Seconds of a call with m rows, interpolated log-log; above the largest measured size they grow with m."""
        times = self.times[choice]
        if m <= 0:
            return 0.0
        at = bisect_left(self.ms, m)
        if at == len(self.ms):
            return times[-1].min * m / self.ms[-1]
        if at == 0 or self.ms[at] == m:
            return times[at].min
        low, high = self.ms[at - 1], self.ms[at]
        share = math.log(m / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(_least(times[at - 1])) + share * math.log(_least(times[at])))

    def route(self, choices: Sequence[str]) -> Route:
        """The route of least total slowdown among those that move one way, from decode paths to dense ones.

        choices: in the order in which they may take over as rows grow; one may come again. A path starts at a measured size
        where it beats the one before by more than the measured spread of both and `MARGIN`, and the total over all sizes
        decides where, so that noise at one size neither flips a choice nor moves it below what was seen.
        Disturbances only ever add time: the least sample stands for a path.
        """
        pieces = self.pieces(choices)
        return Route(tuple(start for start, _ in pieces), tuple(path_of(choice) for _, choice in pieces))

    def pieces(self, choices: Sequence[str]) -> tuple[tuple[int, str], ...]:
        """The route as (first number of rows, choice); the first is 0."""
        spread = [statistics.median(t.spread for t in self.times[c]) for c in choices]
        logs = [[math.log(_least(t)) for t in self.times[c]] for c in choices]

        def ahead(new: int, old: int) -> list[bool]:
            least = 1 + max(MARGIN, spread[new] + spread[old])
            return [a.min * least < b.min for a, b in zip(self.times[choices[new]], self.times[choices[old]], strict=True)]

        beats = [[ahead(c, o) for o in range(c)] for c in range(len(choices))]
        # By the choice that serves a size: (cost of the sizes so far, the sum of their choices' places, starts, choices) of the
        # best such route. On a tie sizes are for earlier choices: int4 costs no memory.
        best: list[tuple[float, int, tuple[int, ...], tuple[int, ...]]] = [(0.0, 0, (0,), (0,))]
        best += [(0.0, 0, (0,), (c,)) if beats[c][0][0] else (math.inf, 0, (), ()) for c in range(1, len(choices))]
        for e in range(len(self.ms)):
            before, best = best, []
            for c in range(len(choices)):
                others = [before[o] for o in range(c) if e > 0 and beats[c][o][e]]
                taken = [(cost, places, (*starts, e), (*used, c)) for cost, places, starts, used in others]
                cost, places, starts, used = min([before[c], *taken])
                best.append((round(cost + logs[c][e], 9), places + c, starts, used))
        _, _, starts, used = min(best)
        rows = (0, *(self.ms[e] for e in starts[1:]))
        return tuple(zip(rows, (choices[c] for c in used), strict=True))

    def to_json(self) -> dict[str, Any]:
        """{"ms", "n", "times": {choice: [[median, min, max, spread], ...]}, "failed": [choice, ...]}, in seconds."""
        times = {c: [[t.median, t.min, t.max, t.spread] for t in ts] for c, ts in self.times.items()}
        return {"ms": list(self.ms), "n": self.n, "times": times, "failed": list(self.failed)}

    @staticmethod
    def from_json(found: Any) -> Measured:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        ms = tuple(int(m) for m in found["ms"])
        times = {str(c): tuple(Timing(*map(float, t)) for t in ts) for c, ts in found["times"].items()}
        ascending = all(0 < a < b for a, b in zip((0.5, *ms), ms, strict=False))
        whole = all(len(ts) == len(ms) and all(math.isfinite(t.min) and t.min >= 0 for t in ts) for ts in times.values())
        if not (ms and times and ascending and whole):
            raise ValueError("sizes and times do not belong together")
        return Measured(ms, times, int(found["n"]), failed=tuple(map(str, found.get("failed", ()))))


def _least(t: Timing) -> float:
    return max(t.min, 1e-9)


def held(pieces: Sequence[tuple[int, str]], least: int, few: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """A route (`Measured.pieces`), but one of `few` below `least` rows: the first, or which of them the route has there."""
    if least <= 0:
        return tuple(pieces)
    early = [(s, c) for s, c in pieces if s < least and c in few]
    early = early if early and early[0][0] == 0 else [(0, few[0]), *early]
    late = [(least, [c for s, c in pieces if s <= least][-1]), *((s, c) for s, c in pieces if s > least)]
    return tuple(early + late[late[0][1] == early[-1][1] :])


@dataclass(frozen=True)
class Form:
    """What a weight may be held as, besides what the checkpoint made of it.

    name, nbytes: as in `TwinOption`; choices: the ways to compute it then, in the order in which they may take over as rows
    grow, one of them perhaps again; paths: theirs, where their names do not say it.
    """

    name: str
    nbytes: int
    choices: tuple[str, ...]
    paths: tuple[Path, ...] = ()
    is_twin: bool = True

    @property
    def named(self) -> dict[str, Path]:
        """The path of each choice."""
        return dict(zip(self.choices, self.paths or map(path_of, self.choices), strict=True))


@dataclass(frozen=True)
class Costs:
    """What one kind of weight could be held as, and what each form would save: the `Offer` of measured times.

    base: the weight without anything more. n: output features of the weight, of which `measured.n` were timed. least: decode
    kernels serve all calls of fewer rows. most: rows of a call of the weight, whatever the workload's; 0: as many as those.
    """

    measured: Measured
    base: Form
    forms: tuple[Form, ...]
    n: int
    least: int = 0
    most: int = 0
    _solved: dict[Form, tuple[tuple[int, str], ...]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def route(self, form: Form | None = None) -> Route:
        """Which path serves which rows, with a form or without any."""
        form = form or self.base
        named, pieces = form.named, self._pieces(form)
        return Route(tuple(start for start, _ in pieces), tuple(named[choice] for _, choice in pieces))

    def seconds(self, form: Form | None, workload: Workload) -> float:
        """Seconds of an average call of the workload, by the route that would be used."""
        return math.fsum(seconds for seconds, _ in self._calls(form, workload))

    def _calls(self, form: Form | None, workload: Workload) -> list[tuple[float, str]]:
        """Of each of the workload's calls: its share of the seconds of an average one, and the choice that serves it."""
        pieces = self._pieces(form or self.base)
        found = []
        for rows, share in workload.calls:
            m = min(rows, self.most or rows)
            choice = next(c for start, c in reversed(pieces) if start <= m)
            found.append((share * self.measured.time_at(choice, m) * self.n / self.measured.n, choice))
        return found

    def _pieces(self, form: Form) -> tuple[tuple[int, str], ...]:
        if form not in self._solved:  # thousands of layers of one kind ask
            few = [choice for choice, path in form.named.items() if path in (Path.INT4, Path.INNER)]
            self._solved[form] = held(self.measured.pieces(form.choices), self.least, few)
        return self._solved[form]

    def options(self, workload: Workload) -> tuple[TwinOption, ...]:
        """The forms with what they save in an average call; nothing where that is below `MARGIN` of the calls they serve."""
        saved = self._saved(self._calls(None, workload), workload)
        return tuple(TwinOption(f.name, f.nbytes, math.fsum(us), f.is_twin) for f, us in zip(self.forms, saved, strict=True))

    def gains(self, workload: Workload) -> Mapping[int, tuple[float, float]]:
        """By rows of the workload's calls: microseconds without any form, and the most that one form saves of them."""
        without = self._calls(None, workload)
        most = [max(us) for us in zip(*self._saved(without, workload), strict=True)] or [0.0] * len(without)
        calls = zip(workload.calls, without, most, strict=True)
        return {m: (seconds * 1e6, saved) for (m, _), (seconds, _), saved in calls}

    def _saved(self, without: Sequence[tuple[float, str]], workload: Workload) -> list[list[float]]:
        """By form, the microseconds saved of each of the workload's calls; zeros where together they are below `MARGIN` of the
        calls that the form serves. without: `_calls` without any form.
        """
        found = []
        for form in self.forms:
            calls = list(zip(without, self._calls(form, workload), strict=True))
            saved = [(was - now) * 1e6 if before != after else 0.0 for (was, before), (now, after) in calls]
            served = math.fsum(was * 1e6 for (was, before), (_, after) in calls if before != after)
            found.append(saved if math.fsum(saved) >= MARGIN * served else [0.0] * len(saved))
        return found
