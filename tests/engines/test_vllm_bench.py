"""`bench --engine vllm`, without vLLM: its arguments, its arithmetic and its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from twinweight import report
from twinweight.cli import app
from twinweight.engines.vllm import arm as serving
from twinweight.engines.vllm import bench as served
from twinweight.engines.vllm.arm import Workload
from twinweight.errors import ConfigError, TwinweightError


def arm(ttft: list[float], tpot: list[float], *, on: bool = False) -> dict[str, Any]:
    twins = {
        "twins": {"a": {}, "b": {}}, "copies": 1, "inner": {"a": "Marlin", "b": "Marlin"}, "bytes": 1 << 30,
        "routes": {"8x8": "twin"},
    }  # fmt: skip
    points = [{"prompt_tokens": 512, "concurrency": 8, "ttft_s": ttft, "tpot_s": tpot, "itl_s": tpot[::-1]}]
    return {
        "startup_s": 20.0 + 5 * on, "kv_tokens": 1000 - 100 * on, "inner_kernel": "Marlin", "twinweight": twins if on else None,
        "vllm": "0.32.0", "points": points,
    }  # fmt: skip


def summary() -> dict[str, Any]:
    runs = {
        "off": [arm([0.2, 0.1], [0.01, 0.01]), arm([0.3, 0.2], [0.01, 0.02])],
        "on": [arm([0.1, 0.1], [0.01, 0.01], on=True), arm([0.05, 0.2], [0.01, 0.01], on=True)],
    }
    return served.summary("model", Workload(((512, 8),), 16, 2), runs, tp=2)


def test_medians_are_over_all_rounds() -> None:
    found = summary()
    off, on = found["records"]
    assert (off["mode"], off["tp"], off["ttft_ms"], off["ttft_ms_range"]) == ("off", 2, 200.0, [100.0, 300.0])
    assert (on["mode"], on["ttft_ms"], on["tpot_ms"], on["kv_tokens"], on["startup_s"]) == ("on", 100.0, 10.0, 900, 25.0)
    assert (off["itl_ms"], off["itl_ms_range"], off["twins"], on["twins"]) == (10.0, [10.0, 20.0], 0, 2)
    assert found["ratios"] == [{"prompt_tokens": 512, "concurrency": 8, "ttft": 2.0, "tpot": 1.0, "itl": 1.0}]
    assert found["noise"] == [{"prompt_tokens": 512, "concurrency": 8, "ttft": 1.6667, "tpot": 1.5, "itl": 0.6667}]
    assert found["arms"]["on"] == {
        "kv_tokens": 900, "startup_s": 25.0, "startups_s": [25.0, 25.0], "twins": 2, "copies": 1, "weights": 2, "twin_gib": 1.0,
        "routes": {"8x8": "twin"},
    }  # fmt: skip


def test_one_request_at_a_time_needs_no_itl() -> None:
    alone = summary()
    alone["records"] = [r | {"concurrency": 1} for r in alone["records"]]
    alone["ratios"] = [r | {"concurrency": 1} for r in alone["ratios"]]
    old = summary()  # what was measured before there was one
    old["ratios"] = [{k: v for k, v in r.items() if k != "itl"} for r in old["ratios"]]
    for result in (alone, old):
        console = Console(width=80, record=True, color_system=None)
        console.print(report.vllm_bench_table(result))
        assert "ITL" not in console.export_text()


def test_the_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, color_system=None)
    console.print(report.vllm_bench_table(summary()))
    text = console.export_text()
    assert "2.00x" in text
    assert "ITL gain" in text
    assert "1,000 tokens off, 900 on" in text
    assert "2 of 2 weights have a twin" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_server_without_a_weight_for_a_twin_says_so() -> None:
    """vLLM on CPUs with AMX quantizes activations, unless told otherwise."""
    result = summary()
    result["arms"]["on"] |= {"weights": 0, "twins": 0, "routes": {}}
    console = Console(width=80, record=True, color_system=None)
    console.print(report.vllm_bench_table(result))
    text = console.export_text()
    assert "no weight could have a twin" in text
    assert "0 of 0" not in text
    assert "paths by rows" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm", "--image", "64x64"], "no --batch, --image or --device"),
        (["--engine", "vllm", "--batch", "2"], "no --batch, --image or --device"),
        (["--engine", "vllm", "--concurrency", "1,x"], "--concurrency is '1,x', expected whole numbers"),
        (["--engine", "vllm", "--prompt-tokens", "0"], "--prompt-tokens is '0', expected whole numbers"),
        (["--engine", "vllm", "--engine-args", "[1]"], "--engine-args is [1], expected an object"),
        (["--engine", "vllm", "--engine-args", "{"], "--engine-args is not JSON"),
        (["--engine", "vlm"], "--engine is 'vlm', expected hf or vllm"),
        (["--prompt-tokens", "1,2"], "hf takes one --prompt-tokens"),
        (["--rounds", "2"], "no --rounds"),
    ],
)
def test_bad_arguments_say_what_is_expected(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", str(tmp_path), *arguments])
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="for environments without vLLM")
def test_vllm_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs vLLM"):
        served.bench(Path("model"), Workload(((8, 1),)))


def test_a_server_that_fails_is_an_error_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nseq 1 40\necho out of luck >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(served.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(TwinweightError, match=r"vLLM ended with code 3; its last lines:\n17\n(.|\n)*out of luck"):
        served.bench(tmp_path, Workload(((8, 1),)))


def test_off_is_no_arm_against_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="expected soft or hard"):
        served.bench(Path(), Workload(((8, 1),)), mode="off")


def test_twins_without_an_installed_plugin_are_refused_before_a_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "entry_points", lambda **_: ())
    job = serving.Job({"model": "m", "additional_config": {"twinweight": {"mode": "soft"}}}, Workload(((8, 1),)))
    with pytest.raises(TwinweightError, match="install twinweight"):
        serving.run(job)
