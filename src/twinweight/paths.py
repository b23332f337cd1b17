"""The ways to compute `x @ W.T + b`, and `Route`: which of them serves which number of rows."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property


class Path(IntEnum):
    """INT4: decode kernel. FUSED: int4 unpacked inside the GEMM. TWIN: dense GEMM on the twin. STREAM: expand, then GEMM.

    INNER: vLLM's own kernel, where a layer has a copy of the int4 weight in our layout, and so the other paths, besides. Where
    it has none, that kernel is its INT4.
    """

    INT4 = 0
    FUSED = 1
    TWIN = 2
    STREAM = 3
    INNER = 4


@dataclass(frozen=True)
class Route:
    """Piecewise choice: from starts[i] rows on, paths[i]; starts[0] is 0 and starts ascend."""

    starts: tuple[int, ...]
    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if len(self.starts) != len(self.paths) or not self.starts or self.starts[0] != 0 or not ascending:
            raise ValueError(f"a route needs ascending starts from 0, one a path; got {self.starts} for {self.paths}")

    @staticmethod
    def always(path: Path) -> Route:
        """One path whatever the number of rows (tests force a path with it)."""
        return Route((0,), (path,))

    def at(self, m: int) -> Path:
        """The path for m rows."""
        return self.paths[bisect_right(self.starts, m) - 1]

    def start_of(self, path: Path) -> int | None:
        """The fewest rows that take `path`: its crossover, or None if it is never taken."""
        return next((s for s, p in zip(self.starts, self.paths, strict=True) if p == path), None)

    def flat(self) -> list[int]:
        """[start, path, start, path, ...], the form in which the custom op takes it; the same list at every call."""
        return self._flat

    @cached_property
    def _flat(self) -> list[int]:
        return [v for pair in zip(self.starts, self.paths, strict=True) for v in (pair[0], int(pair[1]))]

    def __str__(self) -> str:
        parts = [f"{p.name.lower()} from M={max(s, 1)}" for s, p in zip(self.starts, self.paths, strict=True)]
        return ", ".join(parts)


def pick(flat: Sequence[int], m: int) -> int:
    """The path for m rows, straight from `Route.flat()`: what runs inside the op."""
    path = flat[1]
    for i in range(2, len(flat), 2):
        if m < flat[i]:
            break
        path = flat[i + 1]
    return path


calls: Counter[tuple[int, int]] = Counter()
"""Calls of the op in this process: (a `Path`, number of rows rounded down to a power of two) -> count. Replays of a CUDA
graph do not pass through here: they count once, at capture."""


def counted(path: int, m: int) -> tuple[int, int]:
    """Where a call of m rows by a path counts in `calls`."""
    return path, 1 << (m.bit_length() - 1) if m else 0


def take(flat: Sequence[int], m: int) -> int:
    """The path for m rows, with the call counted; costs no synchronisation."""
    path = pick(flat, m)
    calls[counted(path, m)] += 1
    return path
