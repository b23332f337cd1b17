"""`twinweight plan` from outside: tables, JSON, exit codes, counters of a server."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from twinweight import cli, planner
from twinweight.engines import hf
from twinweight.errors import ConfigError
from twinweight.report import workload_line

ASK = ("plan", "llama-3.2-1b", "--gpu", "rtx4090", "--max-model-len", 8192)


@dataclass
class Command:
    """`twinweight` in this process: a process of its own takes two seconds to start."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *args: object) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self.monkeypatch.setattr(sys, "argv", ["twinweight", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return (int(code) if code else 0, *self.capsys.readouterr())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Command(monkeypatch, capsys)


def test_tables_json_and_plot(run: Command, tmp_path: Path) -> None:
    code, out, err = run(*ASK, "--json", tmp_path / "p.json", "--plot", tmp_path / "p.png")
    assert code == 0, err
    assert max(len(line) for line in out.splitlines() if not line.startswith("written")) <= 80
    text = " ".join(out.split())
    words = ("for twins", "KV floor, 8,192 tokens", "off", "soft", "hard", "roofline", "is assumed", "decode reads int4")
    for word in words:
        assert word in text
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["modes"].keys() == {"off", "soft", "hard"}
    for mode in found["modes"].values():
        assert {"twins", "weights", "twin_bytes", "kv_tokens", "fits"} <= mode.keys()
    lines = {"total", "weights", "activations", "graphs and libraries", "scratch of stream", "KV floor", "for twins"}
    assert lines <= found["budget"].keys()
    assert (tmp_path / "p.png").stat().st_size > 0


def test_a_mode_that_does_not_fit_fails_with_the_arithmetic(run: Command) -> None:
    large = ("plan", "llama-3.3-70b", "--gpu", "h200", "--max-model-len", 32768, "--mode")
    code, out, err = run(*large, "hard")
    assert code == 5
    assert "left for twins" in err
    assert err.count("(up to") == 3
    assert "\nhard" in out
    assert "\nsoft" not in out
    assert run(*large, "soft")[0] == 0


def test_a_mode_is_shown_alike_alone_and_with_the_others(run: Command) -> None:
    for ask in (("llama-3.1-8b", "--kv-floor", 32768), ("llama-3.1-8b",), ("llama-3.3-70b",)):
        rows = []
        for options in ((), ("--mode", "hard")):
            _, out, _ = run("plan", ask[0], "--gpu", "rtx4090", *ask[1:], *options)
            rows.append([line for line in out.splitlines() if line.startswith("hard ")])
        assert rows[0][-1:] == rows[1][-1:]
        assert len(rows[1]) == 1


def test_counters_of_a_server_decide(run: Command, tmp_path: Path) -> None:
    (tmp_path / "decode").write_text('twinweight_calls_total{path="int4",rows="8"} 1000\n')
    (tmp_path / "mixed.json").write_text('{"calls": {"int4": {"8": 1000}, "twin": {"2048": 10}}}')
    twins = {}
    said = {"decode": "8 rows 100 %", "mixed.json": "8 rows 99 %, 2,048 rows 0.99 %"}
    for name, shares in said.items():
        code, out, err = run(*ASK, "--from-metrics", tmp_path / name, "--json", tmp_path / "out.json")
        assert code == 0, err
        text = "".join(out.split())  # folded at 80 columns
        assert f"workload from {tmp_path / name}: {shares}".replace(" ", "") in text
        refusal = f"no twin saves time in calls of these sizes, those of {tmp_path / name}".replace(" ", "")
        assert (refusal in text) == (name == "decode")
        twins[name] = json.loads((tmp_path / "out.json").read_text())["modes"]["soft"]["twins"]
    assert twins == {"decode": 0, "mixed.json": 64}


def test_a_workload_of_many_sizes_is_one_line() -> None:
    assert workload_line("seen.txt", [[1, 0.25], [2048, 0.75]]) == "workload from seen.txt: 1 row 25 %, 2,048 rows 75 %"
    many = [[2**i, 0.05 if i < 4 else 0.16] for i in range(9)]
    assert workload_line("f", many).endswith("256 rows 16 %, 3 other sizes 15 %")


@pytest.mark.parametrize("option", ["--utilization", "--gpu-memory-utilization"])
@pytest.mark.parametrize(
    "command", [ASK[:4], *((name, Path(__file__).parent, *more) for name, more in (
        ("bench", ()), ("load-check", ()), ("profile", ("--out", "OUT")),
    ))], ids=["plan", "bench", "load-check", "profile"],
)  # fmt: skip
def test_both_names_of_the_utilization_are_known_everywhere(
    run: Command, command: tuple[object, ...], option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[float] = []

    def stop(*args: object, **more: float) -> None:
        asked.append(more["utilization"] if more else args[1].utilization)  # type: ignore[attr-defined]
        raise ConfigError("enough")

    monkeypatch.setattr(planner, "plan_model", stop)
    monkeypatch.setattr(hf, "load", stop)
    code, _, err = run(*(tmp_path if part == "OUT" else part for part in command), option, 0.5)
    assert (code, err, asked) == (2, "error: enough\n", [0.5])


def test_an_interruption_is_one_word(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planner, "plan_model", interrupted)
    assert run(*ASK) == (130, "", "interrupted\n")


def test_errors_are_one_message(run: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    for args, code, word in (
        (("plan", "llama-3.2-1b", "--gpu", "abacus"), 2, "RTX 4090"),
        (("plan", "gpt-9", "--gpu", "h200"), 2, "llama-3.2-1b"),
        ((*ASK, "--mode", "on"), 2, "off, soft, hard"),
        ((*ASK, "--tp", 3), 2, "--tp 3"),
        ((*ASK, "--from-metrics", tmp_path / "empty"), 2, "no calls"),
        ((*ASK, "--json", tmp_path / "empty" / "x.json"), 2, "cannot write"),
    ):
        found, _, err = run(*args)
        assert found == code, (args, err)
        assert word in err
        assert "Traceback" not in err
