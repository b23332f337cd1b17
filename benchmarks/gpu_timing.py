"""Timing on a GPU for the benchmarks beside this file: CUDA graphs that rotate over copies, replayed in turn, medians."""

from __future__ import annotations

import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton

from twinweight.graphs import Graphs

ROTATED_BYTES = 192 << 20  # what one round over the copies of a weight must read: three times an H200's L2


def copies_of(nbytes: int) -> int:
    """How many copies of a weight a timing rotates over, so that the L2 cache does not answer for memory."""
    return max(1, min(32, -(-ROTATED_BYTES // max(1, nbytes))))


def capture(calls: list[Callable[[], object]], at_least: int = 1) -> tuple[torch.cuda.CUDAGraph, int]:
    """(graph, calls in it) of all `calls` in turn, again and again up to `at_least`."""
    rounds = -(-at_least // len(calls))

    def run(rounds: int) -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    return _graphs().capture(lambda: run(rounds), warm=lambda: run(1)), rounds * len(calls)


_graphs = functools.cache(Graphs)


def interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int = 7, warm: int = 2) -> dict[str, list[float]]:
    """Microseconds a call in each of `rounds` replays, graphs in turn."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for at in range(warm + rounds):
        for name, (graph, calls) in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if at >= warm:
                samples[name].append(start.elapsed_time(stop) * 1e3 / calls)
    return samples


def time_calls(variants: dict[str, list[Callable[[], object]]], at_least: int, rounds: int = 7) -> dict[str, float]:
    """Median microseconds a call of each variant, a variant being its calls on copies of its weight."""
    graphs = {name: capture(calls, at_least) for name, calls in variants.items()}
    return {name: statistics.median(s) for name, s in interleaved(graphs, rounds).items()}


def environment() -> dict[str, str]:
    """Where and how the times were taken."""
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def copy_bandwidth(nbytes: int = 4 << 30) -> float:
    """Bytes a second, read plus written, of a device-to-device copy by a kernel (a graph would take the copy engine)."""
    source = torch.randint(0, 255, (nbytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    samples = []
    for _ in range(8):
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    return 2 * nbytes / statistics.median(samples[2:]) * 1e3


def matrix_rate(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """FLOP a second of a size x size x size product on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    us = time_calls({"mm": [lambda: a @ b.t()]}, 1)["mm"]
    return float(2 * size**3 / us * 1e6)
