"""What a number of rows leads to: worked out once, and shared by layers that are alike.

One prefill calls hundreds of layers, and whatever a call reads of Python has left the caches since the one before: it takes
five to ten times as long as in a loop. Layers that are alike share their steps, which are read once instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What a number of rows leads to. counted: as in `paths.calls`. again: the path (x, what it multiplies x with, ...) -> y,
    worked out already; None where nothing can be.
    """

    path: int
    counted: tuple[int, int]
    again: Callable[..., Tensor] | None


Steps = dict[Hashable, Step]
_KEPT = 4096  # numbers of rows

_steps: dict[Hashable, Steps] = {}


def steps_of(*alike: Hashable) -> Steps:
    """The steps by number of rows that layers share which agree in all this: the route, and what the weight looks like."""
    return _steps.setdefault(alike, {})


def keep(steps: Steps, rows: Hashable, step: Step) -> None:
    """Remember a step; all are forgotten where there are too many."""
    if len(steps) >= _KEPT:
        steps.clear()
    steps[rows] = step
