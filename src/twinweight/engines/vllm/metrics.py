"""`twinweight_*` in vLLM's `/metrics`: each worker keeps its counts in a small file, which the front end reads at a scrape.

Front end and workers are different processes, and a call into a worker would wait behind a step. A worker looks every two
seconds, in a thread of its own, whether a front end made the directory and whether counts changed; decode does nothing for it.
Not through `vllm.stat_logger_plugins`: installing one there turns `--disable-log-stats` off in every server.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

log = logging.getLogger("vllm.twinweight")

INTERVAL = 2.0
"""Seconds between two looks at the counts."""

_LABELS = ("engine", "rank")
_GAUGES = {
    "twins": ("twinweight_twins", "Linear weights of this rank that have a twin."),
    "copies": ("twinweight_copies", "Linear weights of this rank that have an int4 copy of ours."),
    "missed": ("twinweight_missed", "Linear weights of this rank that were to have a twin or a copy and have none."),
    "bytes": ("twinweight_bytes", "Bytes of twins and copies on this rank, beyond what was freed for them."),
    "kv_tokens": ("twinweight_kv_tokens_given_up", "KV-cache tokens that would fit in the place of twins and copies."),
}
_CALLS = (
    "twinweight_calls",
    "Linear calls by path and rows (down to a power of two). A CUDA graph counts once, at its capture, and not when replayed.",
)


def directory(vllm_config: Any) -> Path:
    """Where the workers of one server meet its front ends: several of those share vLLM's own directory, and no instance id."""
    if shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return Path(shared) / "twinweight"
    return Path(tempfile.gettempdir()) / f"twinweight-{os.getuid()}-{vllm_config.instance_id}"


class Publisher:
    """Keeps <directory>/<pid>.json equal to what `status` returns, as long as there is such a directory and `status` lives."""

    def __init__(self, where: Path, labels: dict[str, str], status: Callable[[], dict[str, Any]]) -> None:
        self.file = where / f"{os.getpid()}.json"
        self.labels = labels
        self._status = weakref.WeakMethod(status)
        self._last: dict[str, Any] | None = None

    def start(self) -> None:
        """Look every INTERVAL seconds, in a thread that ends with the process or the worker."""
        threading.Thread(target=self._run, name="twinweight-metrics", daemon=True).start()
        atexit.register(self.file.unlink, missing_ok=True)

    def _run(self) -> None:
        wait = threading.Event().wait
        try:
            while not wait(INTERVAL):
                if not self.write():
                    return
        except Exception as error:  # whatever it is, it must not reach the server
            log.warning("Twinweight's metrics end: %s", error)

    def write(self) -> bool:
        """Write what changed; False once the worker is gone."""
        status = self._status()
        if status is None:
            self.file.unlink(missing_ok=True)
            return False
        if is_own(self.file.parent) and (found := status()) != self._last:
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps({"labels": self.labels, **found}), encoding="utf-8")
            part.replace(self.file)
            self._last = found
        return True


class Collector:
    """What `/metrics` asks at every scrape: the files of the workers that live."""

    def __init__(self) -> None:
        self.where: Path | None = None
        self._warned = False

    def open(self, where: Path) -> None:
        """Read from here, and invite workers to write here. Raises OSError where that cannot be."""
        where.mkdir(mode=0o700, exist_ok=True)
        if not is_own(where):
            raise PermissionError(f"{where} belongs to somebody else")
        self.where = where
        atexit.register(shutil.rmtree, where, ignore_errors=True)

    def close(self) -> None:
        """Show nothing: the server that follows in this process has no twins."""
        self.where = None

    def describe(self) -> Iterable[Any]:
        """Nothing, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Any]:
        """Prometheus metric families; none, and one warning, where reading fails."""
        try:
            yield from families(_read(self.where)) if self.where is not None else ()
        except Exception as error:  # whatever it is, the server's own metrics must still be served
            if not self._warned:
                self._warned = True
                log.warning("Twinweight's metrics cannot be read: %s", error)


def is_own(where: Path) -> bool:
    """Whether this is a directory of this user: others may write into the directory for temporary files."""
    try:
        found = where.lstat()
    except OSError:
        return False
    return where.is_dir() and not where.is_symlink() and found.st_uid == os.getuid()


def _read(where: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(where.glob("*.json")) if is_own(where) else ():
        with suppress(FileNotFoundError):  # its worker has just ended
            if psutil.pid_exists(int(file.stem)):
                found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def families(workers: Iterable[dict[str, Any]]) -> list[Any]:
    """Prometheus metric families from what workers wrote: "labels" beside what `Life.status` returns."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    gauges = {key: GaugeMetricFamily(name, text, labels=_LABELS) for key, (name, text) in _GAUGES.items()}
    calls = CounterMetricFamily(*_CALLS, labels=(*_LABELS, "path", "rows"))
    for worker in workers:
        own = [worker["labels"][label] for label in _LABELS]
        for key, family in gauges.items():
            family.add_metric(own, worker[key])
        for path, by_rows in worker["calls"].items():
            for rows, count in by_rows.items():
                calls.add_metric([*own, path, rows], count)
    return [*gauges.values(), calls]


_collector: Collector | None = None


def show(vllm_config: Any, on: bool) -> None:
    """Add ours to what this process serves at `/metrics`, or take it away; a failure is one warning."""
    global _collector
    try:
        if on and _collector is None:
            from twinweight.engines.vllm import compat

            _collector = Collector()
            compat.show_metrics(_collector)
        if _collector is not None:
            _collector.open(directory(vllm_config)) if on else _collector.close()
    except Exception as error:  # whatever it is, the server must start
        log.warning("Twinweight has no metrics: %s", error)


def publish(worker: Any, status: Callable[[], dict[str, Any]]) -> None:
    """Let front ends see what `status`, a method, returns about this worker; a failure is one warning."""
    from twinweight.engines.vllm import compat

    try:
        Publisher(directory(worker.vllm_config), compat.metric_labels(worker), status).start()
    except Exception as error:  # whatever it is, the worker must go on
        log.warning("Twinweight has no metrics: %s", error)
