"""Kernels compiled by other processes, for a GPU that is not here."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import compiled_ahead
from twinweight.kernels import compilers
from twinweight.kernels.compilers import Compilers, Job

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled_ahead(tmp_path_factory.mktemp("triton"))


def test_this_process_finds_what_others_compiled(found: dict[str, Any]) -> None:
    assert found["jobs"] >= 4  # decode, small and large tiles of `fused`, and one with a bias
    assert found["compiled"] == found["jobs"]
    assert found["rewritten"] == 0


def test_what_is_compiled_here_is_no_job(found: dict[str, Any]) -> None:
    assert found["again"] == 0


def test_a_job_that_fails_leaves_nothing_and_stops_nothing(found: dict[str, Any]) -> None:
    assert found["failed"] == 0


def test_what_triton_knows_a_kernel_by_does_not_depend_on_what_came_before() -> None:
    """`hopper`'s alone in a process, and behind `fused`'s, which calls some of what it calls."""
    code = "from twinweight.kernels import fused, hopper\nprint(({}, hopper.hopper_dot_kernel.cache_key)[-1])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    runs = [
        subprocess.Popen([sys.executable, "-c", code.format(first)], env=environment, stdout=subprocess.PIPE, text=True)
        for first in ("None", "fused._dot_kernel.cache_key")
    ]
    alone, behind = (run.communicate(timeout=120)[0] for run in runs)
    assert len(alone) > 32
    assert behind == alone


def test_without_processes_a_start_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compilers, "launched", lambda calls: [Job("a", "b", "{}", ("cuda", 90, 32))])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    ahead = Compilers()
    with caplog.at_level(logging.INFO, "twinweight"):
        ahead.add([])
    ahead.finish()
    assert "not compiled ahead: FileNotFoundError" in caplog.text


def test_what_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ahead = Compilers()
    ahead._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.PIPE, text=True)
    ahead._sent.add(Job("a", "b", "{}", ("cuda", 90, 32)))
    process = ahead._process
    monkeypatch.setattr(compilers, "_PATIENCE", 0.1)
    began = time.perf_counter()
    with caplog.at_level(logging.INFO, "twinweight"):
        ahead.finish()
        ahead.finish()
    assert time.perf_counter() - began < 30
    assert process.returncode is not None
    assert "timed out" in caplog.text


def test_an_input_that_others_hold_open_keeps_nobody_waiting() -> None:
    ahead = Compilers()
    ahead._send([Job("twinweight.kernels.nowhere", "b", "{}", ("cuda", 90, 32))])
    process = ahead._process
    assert process is not None
    assert process.stdin is not None
    held = os.dup(process.stdin.fileno())
    ahead.finish()
    os.close(held)
    assert process.returncode == 0


def test_what_launches_a_kernel_is_built_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its C code is compiled against the driver of a GPU, so the driver is another one here."""
    from triton import backends
    from triton.runtime.driver import driver as triton_driver

    monkeypatch.setattr(triton_driver, "set_active", lambda driver: None)
    built: list[tuple[object, object]] = []
    driver = SimpleNamespace(launcher_cls=lambda src, metadata: built.append((src, metadata)))
    found = {
        name: SimpleNamespace(compiler=backend.compiler, driver=(lambda: driver) if name == "nvidia" else None)
        for name, backend in backends.backends.items()
    }
    monkeypatch.setattr(backends, "backends", found)
    kernel = SimpleNamespace(src="source", metadata="metadata")
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(one=SimpleNamespace(preload=lambda data: kernel)))  # type: ignore[arg-type]
    compilers._compile(json.dumps(dataclasses.asdict(Job("kernels", "one", "{}", ("cuda", 90, 32)))))
    assert built == [("source", "metadata")]


def test_processes_that_were_given_nothing_are_not_waited_for() -> None:
    ahead = Compilers()
    ahead.start()
    ahead.start()
    process = ahead._process
    assert process is not None
    began = time.perf_counter()
    ahead.finish()
    assert process.returncode not in (0, None)
    assert time.perf_counter() - began < 5
    assert ahead._process is None


def test_nothing_to_compile_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "launched", lambda calls: [])
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a process was started"))
    ahead = Compilers()
    ahead.add([])
    ahead.finish()
