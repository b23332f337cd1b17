"""`--html`, `--json` and `--plot` from outside: pages are written, and what cannot be written is known before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import reports
from tests.test_plan_command import Command, run
from tests.test_synth import tiny
from twinweight import bench, demo, synth, tune
from twinweight.commands import output
from twinweight.engines import hf
from twinweight.engines.vllm import bench as served
from twinweight.errors import ConfigError
from twinweight.roofline import run as analysis

pytest.importorskip("matplotlib")

__all__ = ["run"]  # a fixture

MODEL = Path(__file__).parent  # nothing reads it
PLAN = ("plan", "llama-3.2-1b", "--gpu", "rtx4090", "--max-model-len", 8192)
TRACE = ("roofline", reports.TRACES / "h200-eager-on.json.gz", "--top", 3)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed results instead of measurements."""
    monkeypatch.setattr(hf, "load", lambda *args, **more: None)
    monkeypatch.setattr(bench, "bench", lambda *args, **more: reports.bench())
    monkeypatch.setattr(served, "bench", lambda *args, **more: reports.served())
    monkeypatch.setattr(tune, "tune", lambda *args, **more: reports.tune())
    monkeypatch.setattr(demo, "quality", lambda *args: reports.demo()["quality"])
    monkeypatch.setattr(demo, "speed", lambda *args, **more: reports.demo()["bench"])


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "arguments",
    [("bench", MODEL), ("bench", MODEL, "--engine", "vllm"), ("tune", MODEL), PLAN, TRACE],
    ids=["bench", "vllm", "tune", "plan", "roofline"],
)
def test_a_page_says_the_result_and_the_command(run: Command, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    page, data = tmp_path / "new" / "a b.html", tmp_path / "new" / "r.json"
    code, out, err = run(*arguments, "--html", page, "--json", data)
    assert code == 0, err
    assert f"written: {page}" in out
    text, result = page.read_text(encoding="utf-8"), json.loads(data.read_text())
    assert text.startswith("<!DOCTYPE html>")
    assert text.count("<figure>") >= 1
    assert result["command"] == " ".join(["twinweight", *map(str, arguments), "--html", f"'{page}'", "--json", str(data)])
    assert f"--html &#x27;{page}&#x27; --json {data}</code>" in text
    assert result["environment"]["date"] in text
    # The page is made from the same data as the table.
    figures = [line.split()[-1] for line in out.splitlines() if line.startswith(("TTFT", "soft", "512", "gemm, decode"))]
    assert all(figure in text for figure in figures)


@pytest.mark.usefixtures("measured")
def test_the_demo_leaves_a_page(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("demo", "--build", tmp_path / "build")[0] == 0
    text = (tmp_path / "build" / "demo.html").read_text(encoding="utf-8")
    assert text.count("<figure>") == 2
    assert "perplexity" in text
    assert {"quality", "bench", "command"} <= json.loads((tmp_path / "build" / "demo.json").read_text()).keys()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = run("demo", "--build", tmp_path / "bare")
    assert code == 0
    assert "demo.html: plots need matplotlib (pip install 'twinweight[report]')" in out
    assert [f.name for f in (tmp_path / "bare").iterdir()] == ["demo.json"]


def test_a_demo_without_its_model_leaves_nothing(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("demo")
    assert (code, out) == (2, "")
    assert "no trained model at models/stdlib-15m" in err
    assert "(--model)" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any measurement is a failure."""

    def fail(*args: Any, **more: Any) -> NoReturn:
        raise AssertionError("work was done")

    for module, name in ((hf, "load"), (served, "bench"), (tune, "tune"), (analysis, "roofline")):
        monkeypatch.setattr(module, name, fail)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("arguments", [("bench", MODEL), ("bench", MODEL, "--engine", "vllm"), ("tune", MODEL), PLAN, TRACE])
def test_what_cannot_be_written_is_known_first(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--html", "--json"):
        for target, why in ((tmp_path / "file" / "x", "cannot write"), (tmp_path, "it is a directory")):
            code, out, err = run(*arguments, option, target)
            assert (code, out) == (2, ""), option
            assert why in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(*arguments, "--html", tmp_path / "x.html")
    assert (code, out) == (2, "")
    assert "twinweight[report]" in err
    assert not (tmp_path / "x.html").exists()


@pytest.mark.usefixtures("idle")
def test_a_plot_of_an_unknown_format_is_known_first(run: Command, tmp_path: Path) -> None:
    for arguments in (("tune", MODEL), PLAN):
        for name in ("x.doc", "x.gif", "x"):
            code, out, err = run(*arguments, "--plot", tmp_path / name)
            assert (code, out) == (2, "")
            assert "expected .png, .svg or .pdf" in err


@pytest.mark.usefixtures("idle")
def test_two_results_in_one_file_are_refused(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options in (("--json", "x.svg", "--plot", "x.svg"), ("--html", "x.svg", "--plot", tmp_path / "x.svg")):
        code, out, err = run(*PLAN, *options)
        assert (code, out) == (2, "")
        assert "x.svg: two options name it" in err
    code, _, err = run(*TRACE, "--json", "r", "--csv", "./r")
    assert (code, "two options name it" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    output.check_files(tmp_path / "a" / "r.json", None, html=tmp_path / "b" / "p.html", plot=tmp_path / "b" / "p.SVG")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b"]
    output.check_files()
    with pytest.raises(ConfigError, match="it is a directory"):
        output.check_files(tmp_path / "a")


def test_a_result_keeps_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/twinweight", "plan", "a b"])
    assert output.stamp({"x": 1})["command"] == "twinweight plan 'a b'"
    assert {"python", "torch", "twinweight", "date"} == output.stamp({})["environment"].keys()
    assert output.stamp({"environment": {"device": "d"}})["environment"] == {"device": "d"}


def test_a_real_run(run: Command, tmp_path: Path) -> None:
    synth.write(tiny("qwen3-0.6b"), tmp_path / "model", group_size=32)
    page = tmp_path / "bench.html"
    short = ("--prompt-tokens", 32, "--output-tokens", 2, "--repeats", 1, "--device", "cpu")
    code, _, err = run("bench", tmp_path / "model", *short, "--html", page)
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    assert "each was run once, so the noise is not known" in text
    assert text.count("<figure>") == 2
