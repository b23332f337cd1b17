"""Launching a kernel again, cheaply: what shapes and dtypes decide is worked out once, and the compiled kernel is kept.

Triton's own launch binds, specializes and hashes every argument on every call, which takes longer than many a kernel here
runs. A `Launch` does that once; later calls hand addresses to the compiled kernel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .device import on_device

log = logging.getLogger("twinweight")

COUNTERS = 8192
"""Tiles that a launch with K split over programs may have."""

FUSING = {"enable_fp_fusion": True}
"""What every kernel is compiled with besides: a product and a sum are one instruction, as they were when kernels were measured
and compared. Triton's default, which 3.10 changes.
"""

_GRAPHS = -1  # in place of a stream
_PLANS_KEPT = 4096  # a server meets a few shapes and as many numbers of rows as its batches have
_COMPILERS = 16  # threads

_plans: dict[Hashable, Plan] = {}
_counters: dict[tuple[torch.device, int, bool], Tensor] = {}
_compiling: set[Hashable] | None = None  # what was compiled, where that is all that is wanted


def compile_together(calls: Iterable[Callable[[], object]]) -> None:
    """Compile the kernels that these calls launch, several at a time; none is run, what they would write stays as it is.

    Most of a compilation waits for LLVM and ptxas, which leave Python to other threads. It only saves time: what fails here,
    for want of memory or by a compiler, is logged, and shows again when it is used.
    """
    try:
        import triton

        several = getattr(triton, "AsyncCompileMode", None)
        threads = ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1))
        with threads, several(threads, ignore_errors=True) if several is not None else nullcontext(), only_compiling():
            for call in calls:
                call()
    except Exception as error:
        log.info("kernels are compiled one by one: %s: %s", type(error).__name__, error)


@contextmanager
def only_compiling() -> Iterator[None]:
    """Here a `Launch` that was not launched before compiles its kernel, and computes nothing. Its tensors may be on "meta"."""
    global _compiling
    _compiling = set()
    try:
        yield
    finally:
        _compiling = None


@dataclass
class Launch:
    """A kernel with its grid, integers and constants. Called with its tensors, which come first in its signature.

    kernel's parameters: tensors, integers, constants, in this order. options: num_warps and the like.
    """

    kernel: Any
    grid: tuple[int, int, int]
    integers: tuple[int, ...]
    constants: tuple[object, ...]
    options: dict[str, int]
    device: torch.device
    _compiled: Any = field(default=None, repr=False)
    _tail: tuple[object, ...] = field(default=(), repr=False)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the tensors' device. The fast way is for addresses aligned to 16 bytes."""
        compiled = self._compiled
        if compiled is None:
            self._first(tensors)
            return
        addresses = [t.data_ptr() if t is not None else None for t in tensors]
        odd = 0
        for address in addresses:
            odd |= address or 0
        if odd & 15 or torch._C._cuda_getDevice() != self.device.index:
            self._first(tensors)
            return
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *self._tail)

    def _first(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Triton's own launch; keeps the compiled kernel where every address is aligned, as it was specialized for that."""
        if _compiling is not None and (key := self._specialized(tensors)) in _compiling:
            return
        with on_device(next(t for t in tensors if t is not None)):
            if _compiling is not None:
                _compiling.add(key)
                self.kernel.warmup(*tensors, *self.integers, *self.constants, grid=self.grid, **self.options, **FUSING)
                return
            compiled = self.kernel[self.grid](*tensors, *self.integers, *self.constants, **self.options, **FUSING)
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
        if aligned and self.device.type == "cuda" and hasattr(compiled, "packed_metadata"):
            self._tail = (*self.integers, *self.constants)
            self._compiled = compiled

    def _specialized(self, tensors: tuple[Tensor | None, ...]) -> Hashable:
        """What Triton may compile the kernel for, for aligned tensors. To ask it takes longer, and there are many sizes."""
        dtypes = tuple(t if t is None else t.dtype for t in tensors)
        integers = tuple((i == 1, i % 16 == 0) for i in self.integers)
        return self.kernel, self.device, self.constants, tuple(self.options.items()), dtypes, integers


@dataclass(frozen=True)
class Plan:
    """What one combination of shapes, strides, dtypes and tiles leads to. launch: None where there is nothing to compute.

    out_shape: of the result. parts: floats of scratch where K is split, else 0.
    """

    out_shape: tuple[int, ...]
    launch: Launch | None
    parts: int = 0


def plan(key: Hashable, make: Callable[[], Plan]) -> Plan:
    """The plan of a key, made, and the tensors checked, when it is first met.

    A key holds what may differ from call to call: shapes, dtypes, row strides, the device. It leaves out what does not: the
    tensors of a weight keep their strides and stay together. Building the key is most of what a call costs.
    """
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        found = _plans[key] = make()
    return found


def counters(device: torch.device) -> Tensor:
    """int32 [COUNTERS] of zeros, which every launch leaves as zeros.

    One for each stream, whose launches follow each other. CUDA graphs have others: one for each stream that was used before it
    was captured (vLLM captures two, of which one computes shared experts), one for all the others. Two graphs that use one must
    not replay at the same time, as they must not where they share a memory pool.
    """
    if device.type != "cuda":
        return _kept(device, 0, False)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if torch.cuda.is_current_stream_capturing():
        # Nothing that outlives a capture may be allocated in it: a first call there clears counters of its own.
        found = _counters.get((device, stream, True), _counters.get((device, _GRAPHS, True)))
        return found if found is not None else torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    _kept(device, _GRAPHS, True)
    _kept(device, stream, True)
    return _kept(device, stream, False)


def _kept(device: torch.device, stream: int, graphs: bool) -> Tensor:
    found = _counters.get((device, stream, graphs))
    if found is None:
        found = _counters[device, stream, graphs] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return found
