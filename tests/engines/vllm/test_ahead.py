"""Which kinds of layers are compiled for while a model loads."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from vllm.engine.arg_utils import EngineArgs

from tests.engines.test_vllm_measure import layer
from twinweight.engines.vllm import ahead, compat, early, measure
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.kernel import TwinLinearKernel


class Compilers:
    """Counts the calls of each kind, and their rows."""

    def __init__(self) -> None:
        self.added: list[set[int]] = []

    def add(self, calls: Iterable[Callable[[], object]]) -> None:
        self.added.append({len(call.args[0]) for call in calls})  # type: ignore[attr-defined]

    def finish(self) -> None:
        self.added.clear()


def coming(n: int, bits: int = 4) -> Any:
    kernel = layer("meta")
    kernel.n, kernel.config.weight_type.size_bits = n, bits
    return kernel


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker of rank 0 on a GPU, with steps of 2048 tokens."""
    monkeypatch.setattr(compat, "chunk", lambda worker: 2048)
    monkeypatch.setattr(compat, "rank", lambda: 0)
    monkeypatch.setattr(measure, "is_known", lambda store, kind, device, most: kind.n == 256)
    return SimpleNamespace(device="cuda:0")


def made(worker: Any, *kernels: Any, config: Config | None = None) -> list[set[int]]:
    """What is compiled for these layers: the rows of each kind's calls."""
    compilers: Any = Compilers()
    with ahead.compiling(compilers, worker, config or Config("soft")):
        for kernel in kernels:
            if TwinLinearKernel.on_made is not None:
                TwinLinearKernel.on_made(kernel)
    assert TwinLinearKernel.on_made is None
    return compilers.added  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("changed", "started"),
    [
        ({}, 1),
        ({"rank": 1}, 0),
        ({"cuda": False}, 0),
        ({"config": Config("soft", crossover=9)}, 0),
        ({"kept": True}, 0),
        ({"begun": True}, 0),
    ],
    ids=str,
)
def test_processes_start_before_a_device_is_opened_where_nothing_was_ever_timed(
    changed: dict[str, Any], started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: changed.get("cuda", True))
    monkeypatch.setattr(early, "has_begun", lambda: "begun" in changed)
    if "kept" in changed:
        (tmp_path / "one.json").touch()
    found: list[int] = []
    compilers: Any = SimpleNamespace(start=lambda: found.append(1))
    ahead.begin(compilers, SimpleNamespace(rank=changed.get("rank", 0)), changed.get("config", Config("soft")))
    assert len(found) == started


def test_each_kind_once_and_none_that_is_known(worker: Any) -> None:
    found = made(worker, coming(256), coming(512), coming(512), coming(1024), coming(512))
    assert len(found) == 2
    assert all({1, 8, 2048} <= rows for rows in found)


def test_nothing_where_there_will_be_no_copy(worker: Any) -> None:
    assert made(worker, coming(512, bits=8)) == [set()]


@pytest.mark.parametrize("other", ["rank", "given", "cpu", "begun"])
def test_nothing_where_nothing_is_timed_or_a_front_end_has_begun(
    other: str, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "has_begun", lambda: other == "begun")
    if other == "rank":
        monkeypatch.setattr(compat, "rank", lambda: 1)
    if other == "cpu":
        worker.device = "cpu"
    assert made(worker, coming(512), config=Config("soft", crossover=64 if other == "given" else None)) == []


def test_what_fails_stops_no_load(worker: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(measure, "is_known", lambda *args: 1 // 0)
    with caplog.at_level(logging.INFO, "vllm.twinweight"):
        assert made(worker, coming(512)) == []
    assert "division" in caplog.text


def test_the_wait_is_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    compilers: Any = Compilers()
    compilers.added.append(set())
    with caplog.at_level(logging.DEBUG, "vllm.twinweight"):
        ahead.finish(compilers)
    assert compilers.added == []
    assert "waited for compilers" in caplog.text


@pytest.mark.parametrize(
    ("settings", "times"), [({"mode": "soft"}, 1), ({"mode": "off"}, 0), ({}, 0), ({"mode": "all"}, 0)], ids=str
)
def test_a_front_end_tells_before_it_inspects_the_model(
    settings: dict[str, str], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Any], Config]] = []
    monkeypatch.setattr(early, "begin", lambda arguments, config: seen.append((early._asked(arguments), config)))
    (tmp_path / "config.json").write_text('{"model_type": "unheard of"}')
    model = str(tmp_path)
    with pytest.raises(ValueError, match="unheard of"):
        EngineArgs(model=model, additional_config={"twinweight": settings}).create_engine_config()
    asked = {"model": model, "revision": None, "dtype": "auto", "tp": 1, "tokens": None}
    assert seen == [(asked, Config("soft"))] * times
