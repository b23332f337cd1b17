"""Kernels compiled ahead of their use by other processes, into Triton's cache on disk, where this one finds them.

Threads do not do it: a tenth of a compilation is Python, which they share (`docs/performance.md`). Run as a module this is the
process that compiles: it reads a `Job` of JSON a line, and ends with an empty one or its input. It needs no GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import IO, Any

import torch

from twinweight.kernels.device import has_gluon
from twinweight.kernels.launch import only_compiling

log = logging.getLogger("twinweight")

_PROCESSES = 32
_PATIENCE = 120.0  # seconds
_END = "\n"
_PIPE = 1 << 20  # bytes: the jobs are written before the process has imported what it needs to read them


@dataclass(frozen=True)
class Job:
    """A kernel, by the module and the name of its function, and what Triton specializes it by (`JITFunction.preload`). target:
    backend, architecture and lanes of the GPU, as Triton names them.
    """

    module: str
    name: str
    specialization: str
    target: tuple[str, int | str, int]


class Compilers:
    """The processes. They are started when there is something to compile, or before; whatever goes wrong with them only costs
    time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._sent: set[Job] = set()

    def start(self) -> None:
        """Start them, for they take seconds to import what they need. Raises OSError where that cannot be."""
        self._started()

    def add(self, calls: Iterable[Callable[[], object]]) -> None:
        """Begin to compile the kernels that these calls launch, on the current GPU; none is run, and nothing is waited for."""
        try:
            jobs = [job for job in launched(calls) if job not in self._sent]
            if jobs:
                self._send(jobs)
        except Exception as error:
            log.info("kernels are not compiled ahead: %s: %s", type(error).__name__, error)

    def finish(self) -> None:
        """Wait for what was added."""
        process, self._process = self._process, None
        if process is None:
            return
        if not self._sent:
            process.kill()
        try:
            # A line, as its input may stay open in a process that was forked meanwhile.
            process.communicate(_END, timeout=_PATIENCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.info("kernels are not compiled ahead: %s", error)
            process.kill()
            process.wait()

    def _send(self, jobs: list[Job]) -> None:
        jobs_in = self._started()
        jobs_in.writelines(json.dumps(asdict(job)) + "\n" for job in jobs)
        jobs_in.flush()
        self._sent.update(jobs)

    def _started(self) -> IO[str]:
        """Where jobs go."""
        if self._process is None:
            self._process = spawn(__name__, stdin=subprocess.PIPE)
            assert self._process.stdin is not None
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, _PIPE)
        assert self._process.stdin is not None
        return self._process.stdin


def spawn(module: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A process that runs a module, silently. Raises OSError where that cannot be."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        text=True, env=environment,
    )  # fmt: skip


def launched(calls: Iterable[Callable[[], object]]) -> list[Job]:
    """The kernels that these calls launch and that this process has not compiled. None is run."""
    from triton.runtime.driver import driver

    found = driver.active.get_current_target()
    target, mine = (found.backend, found.arch, found.warp_size), threading.get_ident()
    jobs: dict[Job, None] = {}

    def see(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        if threading.get_ident() != mine:
            return False
        jobs[Job(fn.module, fn.name, compile["specialization_data"], target)] = None
        return True  # leave it uncompiled

    with _hooked(see), only_compiling():
        for call in calls:
            call()
    return list(jobs)


@contextlib.contextmanager
def _hooked(see: Callable[..., bool]) -> Iterator[None]:
    from triton import knobs

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, see
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def leave_closed(device: torch.device) -> None:
    """From here on this process compiles for an NVIDIA GPU and never opens it: Triton's own driver takes 0.5 GiB there."""
    from triton.runtime.driver import driver

    p = torch.cuda.get_device_properties(device)
    driver.set_active(_Target("cuda", p.major * 10 + p.minor, p.warp_size))


class _Target:
    """In place of Triton's driver: a GPU that kernels are compiled for, and that need not be there."""

    def __init__(self, backend: str, arch: int | str, lanes: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, arch, lanes)

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(line: str) -> None:
    from triton.runtime.driver import driver

    job = Job(**json.loads(line))
    target = _Target(*job.target)
    driver.set_active(target)
    _build_launcher(getattr(importlib.import_module(job.module), job.name).preload(job.specialization), target)


def _build_launcher(kernel: Any, target: _Target) -> None:
    """The C code by which Triton launches a kernel, a quarter of a second of a compiler for each signature. It is built against
    the GPU's driver library, which has to be there.
    """
    from triton.backends import backends

    backend = next(b for b in backends.values() if b.compiler.supports_target(target.get_current_target()))
    backend.driver().launcher_cls(kernel.src, kernel.metadata)


def _serve(lines: Iterable[str]) -> None:
    """Compile each job as it comes, several at a time, until there are no more."""
    importlib.import_module("twinweight.kernels.fused")  # once, before the processes part
    has_gluon()
    processes = min(_PROCESSES, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        for line in itertools.takewhile(lambda line: line != _END, lines):
            pool.submit(_compile, line)


if __name__ == "__main__":
    _serve(sys.stdin)
