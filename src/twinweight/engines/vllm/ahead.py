"""While a server starts: compile what timing its kinds of layers will launch, in other processes. Where a front end has begun
with it (`early`), wait for that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from twinweight import cache
from twinweight.engines.vllm import compat, early, measure
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.kernel import TwinLinearKernel
from twinweight.engines.vllm.kinds import Kind, kind_of
from twinweight.kernels.compilers import Compilers

log = logging.getLogger("vllm.twinweight")


@dataclass(frozen=True)
class Coming:
    """A layer whose weights are not there yet: what of a `Wrapped` says which kernels it may need."""

    n: int
    k: int
    dtype: torch.dtype
    config: Any
    inner: Any
    layer: None = None
    copyable: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("meta"))


def begin(compilers: Compilers, worker: Any, config: Config) -> None:
    """Start the processes before a device is opened, on a machine on which nothing was timed yet."""
    try:
        store = cache.default()
        known = store is not None and not store.is_empty()
        mine = config.crossover is None and worker.rank == 0 and torch.cuda.is_available()
        if mine and not known and not early.has_begun():
            compilers.start()
    except Exception as error:  # it only saves time
        log.info("Twinweight: compilers start later: %s", error)


@contextmanager
def compiling(compilers: Compilers, worker: Any, config: Config) -> Iterator[None]:
    """While layers are made, begin to compile for each kind of them that is to be timed: here, and whose times nobody knows.
    Whatever goes wrong only costs time.
    """
    device = compat.device_of(worker)
    seen: set[Kind] = set()

    def made(kernel: TwinLinearKernel) -> None:
        coming: Any = Coming(kernel.n, kernel.k, kernel.dtype, kernel.config, kernel.inner)
        try:
            kind, most = kind_of(coming), compat.chunk(worker)
            if kind not in seen:
                seen.add(kind)
                if compat.rank() == 0 and not measure.is_known(cache.default(), kind, device, most):
                    compilers.add(measure.launches(coming, most))
        except Exception as error:
            log.info("Twinweight: nothing is compiled for %d x %d while the model loads: %s", kernel.n, kernel.k, error)

    if config.crossover is None and device.type != "cpu" and not early.has_begun():
        TwinLinearKernel.on_made = made
    try:
        yield
    finally:
        TwinLinearKernel.on_made = None


def finish(compilers: Compilers) -> None:
    """Wait for what was begun."""
    began = time.perf_counter()
    early.wait()
    compilers.finish()
    log.debug("Twinweight: waited for compilers for %.1f s", time.perf_counter() - began)
