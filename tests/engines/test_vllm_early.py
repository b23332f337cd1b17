"""What is compiled before a server has made a layer. Needs no vLLM, and a GPU for one test."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.engines.test_vllm_measure import layer
from twinweight import presets
from twinweight.engines.vllm import compat, early, measure
from twinweight.engines.vllm.config import Config
from twinweight.errors import TwinweightError
from twinweight.kernels import compilers
from twinweight.synth_formats import Recipe, quantization_config

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)", early.__name__]


def config(**recipe: Any) -> dict[str, Any]:
    """The config.json of a W4A16 Llama-3.1-8B."""
    given = Recipe(**{"format": "compressed-tensors", "group_size": 128, "symmetric": True, "dtype": "bfloat16", **recipe})
    return {**presets.preset("llama-3.1-8b", 2), "quantization_config": quantization_config(given, ["lm_head"])}


def seen(calls: Iterable[Callable[[], object]]) -> set[object]:
    """What calls launch: by which path, what x and which weight."""
    args = [(call.func, *call.args) for call in calls]  # type: ignore[attr-defined]
    return {(f.__name__, x.shape, x.dtype, w.n, w.k, w.group_size, w.zeros is None, bias) for f, x, w, bias in args}


@pytest.mark.parametrize(("tp", "shapes"), [
    (1, [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]),
    (2, [(3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]),
])  # fmt: skip
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernels_are_those_that_timing_a_rank_launches(tp: int, shapes: list[tuple[int, int]], symmetric: bool) -> None:
    expected = set()
    for n, k in shapes:
        kernel = layer("meta")
        kernel.n, kernel.k, kernel.config.zero_points = n, k, not symmetric
        expected |= seen(measure.launches(kernel, 2048))
    assert seen(early.launches(config(symmetric=symmetric), "auto", tp, 2048)) == expected


def test_the_dtype_is_the_one_that_is_asked_for() -> None:
    assert {call.args[0].dtype for call in early.launches(config(), "half", 1, 2048)} == {torch.float16}  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", ["dense", "act-order"])
def test_nothing_where_there_will_be_no_copy(other: str) -> None:
    given = config(format="gptq") if other == "act-order" else presets.preset("llama-3.1-8b", 2)
    given.get("quantization_config", {})["desc_act"] = True
    assert list(early.launches(given, "auto", 1, 2048)) == []


class Begun:
    """What `early.begin` starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, *, cuda: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.processes: list[subprocess.Popen[str]] = []
        monkeypatch.delenv(early._BEGUN, raising=False)
        monkeypatch.setenv("TWINWEIGHT_CACHE", str(directory))
        monkeypatch.setattr(compilers, "spawn", self.spawn)
        monkeypatch.setattr(compat, "cuda_name", lambda: "H200" if cuda else None)

    def spawn(self, module: str, asked: str) -> subprocess.Popen[str]:
        assert module == early.__name__
        self.asked.append(json.loads(asked))
        process = subprocess.Popen(SLEEPER, text=True)
        self.processes.append(process)
        while not psutil.Process(process.pid).cmdline():  # it has none for a moment
            time.sleep(0.01)
        return process

    def end(self, *, compiled: bool = True) -> None:
        self.processes[-1].kill()
        self.processes[-1].wait()
        if compiled:
            Path(self.asked[-1]["done"]).touch()


def arguments(**given: Any) -> Any:
    """vLLM's engine arguments, those that count."""
    return SimpleNamespace(**{
        "model": "/m", "hf_config_path": None, "revision": None, "dtype": "auto", "tensor_parallel_size": 2,
        "max_num_batched_tokens": None, **given,
    })  # fmt: skip


def test_a_front_end_begins_once_for_a_server_and_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(monkeypatch, tmp_path)
    assert not early.has_begun()
    early.begin(arguments(), Config("soft"))
    early.begin(arguments(), Config("soft"))
    assert len(begun.asked) == 1
    assert begun.asked[0].items() >= {"model": "/m", "revision": None, "dtype": "auto", "tp": 2, "tokens": None}.items()
    assert early.has_begun()
    begun.end()
    early.begin(arguments(), Config("soft"))  # a later start
    assert len(begun.asked) == 1
    assert not early.has_begun()
    early.begin(arguments(hf_config_path="/c", max_num_batched_tokens=2048), Config("soft"))
    assert begun.asked[1].items() >= {"model": "/c", "tokens": 2048}.items()
    begun.end()


def test_workers_do_without_where_the_process_has_compiled_and_not_where_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Begun(monkeypatch, tmp_path)
    early.begin(arguments(), Config("soft"))
    begun.end(compiled=False)
    assert not early.has_begun()
    early.begin(arguments(), Config("soft"))
    begun.end()
    assert early.has_begun()
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert not early.has_begun()


@pytest.mark.parametrize("other", ["given", "off", "platform"])
def test_nothing_begins_where_nothing_is_timed_or_kept(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(monkeypatch, tmp_path, cuda=other != "platform")
    if other == "off":
        monkeypatch.setenv("TWINWEIGHT_CACHE", "off")
    monkeypatch.setenv(early._BEGUN, json.dumps([platform.node(), 0, str(tmp_path)]))  # of an earlier server
    assert early.has_begun()
    early.begin(arguments(), Config("soft", crossover=9 if other == "given" else None))
    assert begun.asked == []
    assert not early.has_begun()


def test_what_fails_stops_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Begun(monkeypatch, tmp_path)
    monkeypatch.setattr(compilers, "spawn", lambda *args: 1 // 0)
    early.begin(arguments(), Config("soft"))
    assert not early.has_begun()


def test_a_worker_waits_for_the_process_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(monkeypatch, tmp_path)
    early.begin(arguments(), Config("soft"))
    monkeypatch.setattr(early, "_PATIENCE", 0.3)
    began = time.perf_counter()
    early.wait()
    assert time.perf_counter() - began >= 0.3
    monkeypatch.setattr(early, "_PATIENCE", 30.0)
    begun.end()
    others = [os.environ[early._BEGUN], *(json.dumps([host, os.getpid(), ""]) for host in (platform.node(), "elsewhere")), "?"]
    for value in others:
        monkeypatch.setenv(early._BEGUN, value)
        early.wait()
    assert time.perf_counter() - began < 15


def test_the_file_says_that_all_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "leave_closed", lambda device: None)
    monkeypatch.setattr(os, "nice", lambda by: None)
    done = tmp_path / "cache/done"
    asked: dict[str, Any] = {"model": str(tmp_path), "revision": None, "done": str(done), "dtype": "auto", "tokens": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(TwinweightError, match="do not split"):
        early.main(**asked, tp=3)
    assert not done.exists()
    (tmp_path / "config.json").write_text("{}")  # of no quantized model: there is nothing to compile
    early.main(**asked, tp=1)
    assert done.exists()


def test_a_config_that_is_not_here_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    answers = [None, None, str(tmp_path / "config.json")]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, revision: answers.pop(0))
    assert early._config_json("some/model", None) == tmp_path / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, revision: None)
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        early._config_json("nobody/nothing", None)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU")
def test_the_process_compiles_and_takes_no_memory_of_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = tmp_path / "done"
    asked = {"model": str(tmp_path), "revision": None, "done": str(done), "dtype": "auto", "tp": 1, "tokens": 2048}
    before = least = torch.cuda.mem_get_info()[0]
    process = subprocess.Popen([sys.executable, "-m", early.__name__, json.dumps(asked)], env=environment)
    while process.poll() is None:
        least = min(least, torch.cuda.mem_get_info()[0])
        time.sleep(0.02)
    assert process.returncode == 0
    assert done.exists()
    assert before - least < 64 << 20
    assert len(list(tmp_path.rglob("*.cubin"))) > 20
