"""`solve`: the bounded multiple-choice knapsack behind `plan`, solved exactly for the weight shapes that models have.

The linear relaxation fixes all but a few weights: an option whose Lagrangian loss exceeds the gap between that bound and the
best plan known cannot be part of a better one. What is left is a list of Pareto states (bytes, time saved), pruned by the same
bound (Dyer, Riha and Walker 1995; Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995). Work is
counted, not timed, so that equal inputs give equal plans on every rank; where it runs out, `gap` bounds what was missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_UNITS = 1 << 30  # the largest saving in integer units: sums of 10,000 stay exact in a float64
_WORK = 3_000_000  # states looked at: about half a second
_STAGE = 256  # what a stage of few states costs, in states

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Item:
    """count weights of one shape. options: (bytes, time saved), of which each weight takes exactly one."""

    count: int
    options: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Solution:
    """taken[i][o]: how many weights of item i take option o. gap: share by which a better plan could at most save more; 0 is
    proven best.
    """

    taken: tuple[tuple[int, ...], ...]
    gap: float


@dataclass(frozen=True)
class _Class:
    """The options of an item worth taking: bytes and savings ascend. at: their places in the item's list."""

    count: int
    at: tuple[int, ...]
    nbytes: tuple[int, ...]
    saved: tuple[int, ...]

    def hull(self) -> list[int]:
        """Options on the upper concave hull."""
        kept: list[int] = []
        for o in range(len(self.at)):
            while len(kept) > 1 and self._slope(kept[-2], kept[-1]) <= self._slope(kept[-1], o):
                kept.pop()
            kept.append(o)
        return kept

    def _slope(self, a: int, b: int) -> float:
        return (self.saved[b] - self.saved[a]) / (self.nbytes[b] - self.nbytes[a])


def solve(items: Sequence[Item], capacity: int) -> Solution:
    """Which options to take: the most time saved within `capacity` bytes, of all combinations.

    Savings are rounded to 2^-30 of the largest. Raises ValueError where the least bytes of all items exceed the capacity.
    """
    most = max((s for item in items for _, s in item.options), default=0.0)
    classes = [_class(item, max(most, 1e-300) / _UNITS) for item in items]
    spare = capacity - sum(c.count * c.nbytes[0] for c in classes)
    if spare < 0:
        raise ValueError(f"the least options need {-spare} bytes more than there are")
    state = _Relaxed(classes, spare)
    if state.split is not None:
        state.fill()
        gap = _search(state)
    else:
        gap = 0.0
    return Solution(tuple(_spread(item, c, n) for item, c, n in zip(items, classes, state.best, strict=True)), gap)


def _class(item: Item, unit: float) -> _Class:
    order = sorted(range(len(item.options)), key=lambda o: (item.options[o][0], -item.options[o][1], o))
    at: list[int] = []
    saved: list[int] = []
    for o in order:
        units = round(item.options[o][1] / unit)
        if not at or units > saved[-1]:
            at.append(o)
            saved.append(units)
    return _Class(item.count, tuple(at), tuple(item.options[o][0] for o in at), tuple(saved))


def _spread(item: Item, c: _Class, counts: list[int]) -> tuple[int, ...]:
    taken = [0] * len(item.options)
    for place, count in zip(c.at, counts, strict=True):
        taken[place] = count
    return tuple(taken)


class _Relaxed:
    """The linear relaxation: options along the hulls, by time saved per byte, until one does not fit.

    at[i][o]: how many of class i hold option o, without the fraction; best, lower: the best whole plan known, and what it
    saves; split: (class, its option now, the next one), of which only some weights took the step; slope: time saved per
    byte there.
    """

    def __init__(self, classes: list[_Class], spare: int) -> None:
        self.classes = classes
        self.at = [[c.count] + [0] * (len(c.at) - 1) for c in classes]
        self.left = spare
        self.split: tuple[int, int, int] | None = None
        steps = [
            (-c._slope(a, b), i, a, b)
            for i, c in enumerate(classes)
            if c.count
            for hull in [c.hull()]
            for a, b in pairwise(hull)
        ]
        self.steps = sorted(steps)
        for n, (slope, i, a, b) in enumerate(self.steps):
            if self._take(self.at, i, a, b) and self.at[i][a]:
                self.split, self.slope, self.rest = (i, a, b), -slope, self.steps[n + 1 :]
                break
        self.best = [list(n) for n in self.at]
        self.saved = sum(n * s for c, ns in zip(classes, self.at, strict=True) for n, s in zip(ns, c.saved, strict=True))
        self.lower = self.saved

    def _take(self, at: list[list[int]], i: int, a: int, b: int) -> bool:
        """Move as many of class i as fit from option a to b."""
        c = self.classes[i]
        step = c.nbytes[b] - c.nbytes[a]
        n = min(at[i][a], self.left // step)
        at[i][a] -= n
        at[i][b] += n
        self.left -= n * step
        return True

    def fill(self) -> None:
        """A first whole plan: what still fits after the split, by time saved per byte."""
        left = self.left
        for _, i, a, b in self.rest:
            self._take(self.best, i, a, b)
        self.left = left
        ns = zip(self.classes, self.best, strict=True)
        self.lower = sum(n * s for c, counts in ns for n, s in zip(counts, c.saved, strict=True))

    @property
    def upper(self) -> float:
        """No plan saves more."""
        return self.saved + self.slope * self.left


@dataclass
class _Group:
    """count weights of class i that hold option `of` in the relaxation, and where else they could go: (option, bytes, saved,
    loss against the bound).
    """

    i: int
    of: int
    count: int
    moves: list[tuple[int, int, int, float]]


def _groups(r: _Relaxed) -> tuple[list[_Group], tuple[int, int]]:
    """What the search may change, the least loss first; and how many weights at the split may step up and down freely.

    Weights of the split class that could take a third option are set apart, as many as the bound allows.
    """
    room = r.upper - r.lower - 1 + 0.1
    i_split, a, b = r.split or (0, 0, 0)
    groups, free = [], (0, 0)
    for i, c in enumerate(r.classes):
        split = i == i_split
        held = dict(enumerate(r.at[i]))
        if split:
            others = [m for of in (a, b) for m in _moves(c, of, r.slope, room) if m[0] not in (a, b)]
            least = min((m[3] for m in others), default=math.inf)
            apart = min(c.count, int(room / max(least, 1e-9)) if others else 0)
            down = min(apart, held[a])
            free = (held[a] - down, held[b] - (apart - down))
            held[a], held[b] = down, apart - down
        for of, count in held.items():
            if count and (moves := _moves(c, of, r.slope, room)):
                groups.append(_Group(i, of, count, moves))
    groups.sort(key=lambda g: (min(m[3] for m in g.moves), g.i, g.of))
    return groups, free


def _moves(c: _Class, of: int, slope: float, room: float) -> list[tuple[int, int, int, float]]:
    moves = []
    for o in range(len(c.at)):
        nbytes, saved = c.nbytes[o] - c.nbytes[of], c.saved[o] - c.saved[of]
        loss = max(0.0, slope * nbytes - saved)
        if o != of and loss <= room:
            moves.append((o, nbytes, saved, loss))
    return moves


def _search(r: _Relaxed) -> float:
    """Improve `r.best` to the best there is; returns the gap that is left."""
    i_split, a, b = r.split or (0, 0, 0)
    c = r.classes[i_split]
    step, gain = c.nbytes[b] - c.nbytes[a], c.saved[b] - c.saved[a]
    groups, (up, down) = _groups(r)
    sizes = [step, *(m[1] for g in groups for m in g.moves)]
    unit = math.gcd(*sizes)
    limit = r.left // unit  # bytes that may still be added, in units that all sizes share
    slope, step = r.slope * unit, step // unit
    nbytes, saved = np.zeros(1, np.int64), np.zeros(1, np.int64)
    stages: list[tuple[_Group, Ints, Ints]] = []
    found: tuple[int, int, int] | None = None  # stage, state, steps of the split class
    lower, work = r.lower - r.saved, 0
    bound = slope * limit

    def complete() -> None:
        """Fill what the states leave with steps of the split class; keep the best."""
        nonlocal lower, found
        steps = np.clip((limit - nbytes) // step, -down, up)
        value = np.where(nbytes + steps * step <= limit, saved + steps * gain, -1 << 62)
        at = int(value.argmax())
        if value[at] > lower:
            lower, found = int(value[at]), (len(stages), at, int(steps[at]))

    complete()
    for group in groups:
        for _ in range(group.count):
            moves = [m for m in group.moves if bound - m[3] >= lower + 0.9]
            if not moves or not len(nbytes):
                break
            parents = np.tile(np.arange(len(nbytes)), len(moves) + 1)
            taken = np.repeat(np.arange(len(moves) + 1), len(nbytes))
            more = np.array([0, *(m[1] // unit for m in moves)])
            gains = np.array([0, *(m[2] for m in moves)])
            new_bytes, new_saved = nbytes[parents] + more[taken], saved[parents] + gains[taken]
            kept = _undominated(new_bytes, new_saved, slope, limit, lower)
            taken = taken[kept]
            if len(kept) and not taken.any() and len(kept) == len(nbytes):
                break
            targets = np.array([group.of, *(m[0] for m in moves)])
            stages.append((group, parents[kept], targets[taken]))
            nbytes, saved = new_bytes[kept], new_saved[kept]
            work += len(parents) + _STAGE
            if len(nbytes):
                complete()
            if work > _WORK:
                break
        if work > _WORK or not len(nbytes):
            break
    left = (saved + slope * (limit - nbytes)).max() if work > _WORK and len(nbytes) else lower
    if found is not None:
        _apply(r, stages, *found)
    total = r.saved + lower
    return max(0.0, float(math.floor(left + 0.1) - lower) / total) if total > 0 else 0.0


def _undominated(nbytes: Ints, saved: Ints, slope: float, limit: int, lower: int) -> Ints:
    """States that could still beat `lower` and that no state of fewer bytes and equal savings stands for, by bytes."""
    alive = np.flatnonzero(saved + slope * (limit - nbytes) >= lower + 0.9)
    order = alive[np.lexsort((-saved[alive], nbytes[alive]))]
    best = np.maximum.accumulate(saved[order])
    first = np.ones(len(order), bool)
    first[1:] = saved[order][1:] > best[:-1]
    return order[first]


def _apply(r: _Relaxed, stages: list[tuple[_Group, Ints, Ints]], stage: int, state: int, steps: int) -> None:
    """Write the plan that ends in a state into `r.best`."""
    best = [list(n) for n in r.at]
    i, a, b = r.split or (0, 0, 0)
    best[i][a] -= steps
    best[i][b] += steps
    for group, parents, targets in reversed(stages[:stage]):
        best[group.i][group.of] -= 1
        best[group.i][int(targets[state])] += 1
        state = int(parents[state])
    r.best = best
