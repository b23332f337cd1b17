"""`tune`: what it measures and keeps, how it judges the choices, what it prints and plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.test_measured import measured
from tests.test_plan_command import Command, run
from tests.test_synth import tiny
from twinweight import cache, crossover, plots, search, synth, tune
from twinweight.crossover import Shape
from twinweight.errors import ConfigError
from twinweight.measured import Costs, Form
from twinweight.report import tune_table
from twinweight.search import GRID
from twinweight.timing import Timing
from twinweight.workload import Workload

__all__ = ["run"]  # a fixture

LAWS: dict[str, Callable[[int], float]] = {
    "int4": lambda m: 1e-5 * m,
    "stream": lambda m: 1e-3 + 2e-6 * m,
    "twin:bfloat16": lambda m: 2e-4 + 2e-6 * m,
    "twin:float32": lambda m: 4e-4 + 4e-6 * m,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "model"
    synth.write(tiny("qwen3-0.6b"), out, group_size=32)
    return out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times by law instead of a clock, kept in a directory of the test."""

    def rows(variants: dict[str, object], m: int, *args: object, **more: object) -> dict[str, Timing]:
        return {c: Timing(LAWS[c](m), LAWS[c](m), LAWS[c](m)) for c in variants}

    for timing, having in ((search, crossover), (tune, tune)):
        monkeypatch.setattr(timing, "time_rows", rows)
        monkeypatch.setattr(having, "variants", lambda shape, n, names: dict.fromkeys(names, lambda x: x))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))


@pytest.mark.usefixtures("clock")
def test_every_shape_is_measured_and_kept(model: Path, tmp_path: Path) -> None:
    result = tune.tune(model, device="cpu", check=True)
    assert sum(s["count"] for s in result["shapes"]) == 14
    assert len(list((tmp_path / "cache").iterdir())) == len(result["shapes"])
    for shape in result["shapes"]:
        assert {p["m"] for p in shape["points"]} >= set(GRID["cpu"])
        assert all(p["winner"] == min(p["us"], key=p["us"].get) for p in shape["points"])
        assert shape["takeovers"]["bfloat16"] == [27]  # 2 % late, at the next odd number
        assert 125 < shape["takeovers"]["none"][0] < 141  # 2 % late, and as coarse as takeovers are looked for
        assert shape["saved_us"]["bfloat16"] == max(shape["saved_us"].values()) > 0
    assert result["regret"]["geomean"] <= 1.005
    assert 1 <= result["regret"]["worst"] <= 1.1
    assert {p["form"] for p in result["points"]} == {"none", "bfloat16"}
    json.dumps(result)


@pytest.mark.usefixtures("clock")
def test_what_cannot_be_written_is_not_called_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    assert tune.tune(model, device="cpu")["cache"] is None


def test_regret_is_the_time_chosen_over_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that takes the twin from 4 rows, where it pays from 2."""
    times = measured(int4=[1.0, 2, 4, 8], twin_bfloat16=[2.0, 2, 2, 2])
    late = Costs(measured(int4=[1.0, 1, 4, 8], twin_bfloat16=[2.0, 2, 2, 2]), Form("none", 0, ("int4",)),
                 (Form("bfloat16", 10, ("int4", "twin:bfloat16")),), 64)  # fmt: skip
    asked: list[int] = []

    def rows(variants: dict[str, object], m: int, *args: object, **more: object) -> dict[str, Timing]:
        asked.append(m)
        disturbed = 10.0 if asked.count(m) == 1 and m == 8 else 1.0  # gone when it is timed again
        return {
            c: Timing(t, t * (disturbed if c == "twin:bfloat16" else 1), t) for c in variants for t in [times.time_at(c, m)]
        }

    monkeypatch.setattr(tune, "time_rows", rows)
    monkeypatch.setattr(tune, "variants", lambda shape, n, names: dict.fromkeys(names))
    shape = Shape(64, 64, 64, True, False, torch.bfloat16, torch.device("cpu"))
    points = tune.check_shape(shape, late, Workload.prefill(8))
    assert [(p["m"], p["chosen"], p["best"], p["regret"]) for p in points] == [
        (1, "int4", "int4", 1.0),
        (2, "int4", "int4", 1.0),
        (3, "int4", "twin:bfloat16", 1.5),
        (4, "twin:bfloat16", "twin:bfloat16", 1.0),
        (5, "twin:bfloat16", "twin:bfloat16", 1.0),
        (6, "twin:bfloat16", "twin:bfloat16", 1.0),
        (7, "twin:bfloat16", "twin:bfloat16", 1.0),
        (8, "twin:bfloat16", "twin:bfloat16", 1.0),
    ]
    assert tune.regret(points) == {"geomean": pytest.approx(1.5 ** (1 / 8), abs=1e-4), "worst": 1.5}
    assert tune.regret([]) == {"geomean": 1.0, "worst": 1.0}


@pytest.mark.usefixtures("clock")
def test_the_command(run: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "tune.json"
    code, out, err = run("tune", model, "--device", "cpu", "--check", "--json", file)
    assert code == 0, err
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 80
    for word in ("no twin: int4 from M=1", "* the fastest", "twin bf16", "regret over", "kept in"):
        assert word in out
    found = json.loads(file.read_text())
    assert {"geomean", "worst"} == found["regret"].keys()
    assert found["points"]
    code, _, err = run("tune", tmp_path / "nothing")
    assert code == 2
    assert "model directory" in err


@pytest.mark.usefixtures("clock")
def test_table_and_plot(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")
    result = tune.tune(model, device="cpu")
    assert "regret" not in result
    console = Console(width=80, no_color=True, record=True)
    console.print(tune_table(result))
    text = console.export_text()
    assert "not kept" in text
    assert "regret" not in text
    pytest.importorskip("matplotlib")
    plots.tune_plot(result, tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        plots.tune_plot(result, tmp_path / "tune.png" / "x.png")
