"""One timing helper, used by the tuner and by every benchmark: variants interleaved, medians, spread."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: the median of the repeats, the least and the most.

    doubt: how far the least may be off, as a share; None follows from the median.
    """

    median: float
    min: float
    max: float
    doubt: float | None = None

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """Summarise samples in seconds.

        Where there are many, the doubt is what lies between the least and the quarter above it: on a busy machine half of the
        samples can be a thousand times too long (a thread that waits for its core), and the lower ones are still right.
        """
        ordered = sorted(samples)
        quarter = ordered[(len(ordered) - 1) // 4]
        doubt = 0.5 * (quarter - ordered[0]) / quarter if len(ordered) >= 8 and quarter else None
        return Timing(statistics.median(ordered), ordered[0], ordered[-1], doubt)

    @property
    def spread(self) -> float:
        """How far the time may be off, as a share of it: half the distance from the least to the median, or `doubt`."""
        if self.doubt is not None:
            return self.doubt
        return 0.5 * (self.median - self.min) / self.median if self.median else 0.0

    def times(self, factor: float) -> Timing:
        """The same for calls `factor` times as long."""
        return Timing(self.median * factor, self.min * factor, self.max * factor, self.doubt)

    def scaled(self, factor: float, digits: int = 3) -> dict[str, float]:
        """{"median", "min", "max"} in another unit, for JSON."""
        return {k: round(v * factor, digits) for k, v in (("median", self.median), ("min", self.min), ("max", self.max))}


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    repeats: int = 3,
    warmup: int = 1,
    enough: int = 0,
    patience: float = 0.0,
    hopeless: float = math.inf,
) -> dict[str, Timing]:
    """Time each variant `repeats` times, in turn (a, b, a, b, ...), after `warmup` uncounted rounds.

    enough, patience: rounds are added until there are `enough` samples or `patience` seconds are over. hopeless: a variant with
    a least of so many times the best's is left out of those. On a GPU with events, elsewhere with the clock. The caller rotates
    buffers and captures graphs where a variant is short.
    """
    clock = _time_on_gpu if device.type != "cpu" else _time_on_host
    samples: dict[str, list[float]] = {name: [] for name in variants}
    left = dict(variants)
    round_, started = 0, time.perf_counter()
    while round_ < warmup + repeats or (round_ < warmup + enough and time.perf_counter() - started < patience):
        if round_ == warmup + repeats:
            best = min(min(s) for s in samples.values())
            left = {name: call for name, call in variants.items() if min(samples[name]) < hopeless * best}
        for name, call in left.items():
            seconds = clock(call, device)
            if round_ >= warmup:
                samples[name].append(seconds)
        round_ += 1
    return {name: Timing.of(s) for name, s in samples.items()}


def in_turn(calls: Sequence[Callable[[torch.Tensor], object]]) -> Callable[[torch.Tensor], object]:
    """One call for these, on copies of a weight: it makes the first, the next time the second, and after the last the first."""
    turn = itertools.cycle(calls)
    return lambda x: next(turn)(x)


def under_load(calls: Mapping[Key, Callable[[], object]], *, device: torch.device, seconds: float) -> dict[Key, Timing]:
    """The times of calls on a busy device: each is repeated for so long, half of it in turn and half on the way back, without a
    rest. The second half of each counts, and the median stands for the least; what comes first runs as long before that.

    A GPU that comes to its power limit lowers its clocks within a tenth of a second: it computes as fast as it may with the
    energy that a call takes, and a call that is faster on a rested GPU may be the slower one then. So each is repeated alone:
    among others it would run by the clocks that they leave it (`docs/planning.md`).
    """
    clock = _time_on_gpu if device.type != "cpu" else _time_on_host
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    there = list(calls)
    for at, key in enumerate((there[0], *there, *reversed(there))):
        found: list[float] = []
        started = time.perf_counter()
        while not found or time.perf_counter() - started < seconds / 2:
            found.append(clock(calls[key], device))
        if at > 0:
            samples[key] += found[len(found) // 2 :]
    return {key: _settled(found) for key, found in samples.items()}


def _settled(samples: list[float]) -> Timing:
    t = Timing.of(samples)
    return replace(t, min=t.median, doubt=t.spread)


def _time_on_host(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_on_gpu(call: Callable[[], object], device: torch.device) -> float:
    module = torch.get_device_module(device.type)
    start, stop = module.Event(enable_timing=True), module.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
