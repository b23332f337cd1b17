"""`twinweight profile` on the shipped model, and the labels that it and the ops put into a trace."""

from __future__ import annotations

import json
import timeit
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twinweight import labels
from twinweight.cli import app
from twinweight.errors import ConfigError
from twinweight.roofline.run import roofline

MODEL = Path(__file__).parents[2] / "models" / "stdlib-15m"


def test_profile_then_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a twin is used is measured, so only shapes and phases are exact."""
    done = CliRunner().invoke(
        app, ["profile", str(MODEL), "--out", str(tmp_path), "--prompt-tokens", "96", "--output-tokens", "3", "--batch", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "twinweight roofline" in done.stdout
    result = roofline([tmp_path / "off.json.gz", tmp_path / "on.json.gz"], gpu="gfx1151")
    shapes = {"384x384", "128x384", "1152x384", "384x1152"}
    for side in ("before", "after"):
        arm = result[side]
        assert [(p["phase"], p["steps"], p["rows"]) for p in arm["phases"][:2]] == [("prefill", 1, [192]), ("decode", 2, [2])]
        linears = [r for r in arm["ops"] if r["path"]]
        assert {r["shape"] for r in linears} == {f"{m}x{s}" for m in (192, 2) for s in shapes}
        assert all(r["roof_pct"] is not None and r["bound"] for r in linears)
    assert "int4" in {r["path"] for r in result["before"]["ops"]} <= {"", "int4", "stream"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "onnx"], "--engine is 'onnx'"),
        (["--mode", "off"], "--mode is 'off'"),
        (["--mode", "soft", "--engine-args", "{}"], "takes no --engine-args"),
        (["--engine", "vllm", "--engine-args", "[]"], "--engine-args"),
        (["--engine", "vllm", "--engine-args", "{"], "--engine-args is not JSON"),
        (["--engine", "vllm", "--device", "cpu"], "takes no --device"),
        (["--device", "cpu", "--prompt-tokens", "5000"], "are more than the model's"),
    ],
)
def test_bad_settings(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["profile", str(MODEL), "--out", str(tmp_path), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_labels_only_while_a_profiler_records(tmp_path: Path) -> None:
    with labels.labelled(2, 1, 2, 3) as nothing:
        assert nothing is None
    with torch.profiler.profile() as profiler, labels.labelled(0, 1, 4096, 14336):
        torch.ones(1)
    profiler.export_chrome_trace(str(tmp_path / "t.json"))
    names = [e["name"] for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"]]
    assert "twinweight::int4 1x4096x14336" in names
    assert not any("twin 1x2x3" in n for n in names)


def test_a_label_costs_less_than_a_microsecond() -> None:
    def once() -> None:
        with labels.labelled(0, 1, 2, 3):
            pass

    assert min(timeit.repeat(once, number=2000, repeat=20)) / 2000 < 1e-6
