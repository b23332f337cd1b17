"""One timing helper, used by the tuner and by every benchmark: variants interleaved, medians, spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: the median of the repeats, the least and the most."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """Summarise samples in seconds."""
        return Timing(statistics.median(samples), min(samples), max(samples))

    @property
    def spread(self) -> float:
        """How far the median may be off, as a share of it: half the distance from the least to the median."""
        return 0.5 * (self.median - self.min) / self.median if self.median else 0.0

    def scaled(self, factor: float, digits: int = 3) -> dict[str, float]:
        """{"median", "min", "max"} in another unit, for JSON."""
        return {k: round(v * factor, digits) for k, v in (("median", self.median), ("min", self.min), ("max", self.max))}


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, device: torch.device, repeats: int = 3, warmup: int = 1
) -> dict[str, Timing]:
    """Time each variant `repeats` times, in turn (a, b, a, b, ...), after `warmup` uncounted rounds.

    On a GPU with events, elsewhere with the clock. The caller rotates buffers and captures graphs where a variant is short.
    """
    clock = _time_on_gpu if device.type != "cpu" else _time_on_host
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            seconds = clock(call, device)
            if round_ >= warmup:
                samples[name].append(seconds)
    return {name: Timing.of(s) for name, s in samples.items()}


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
