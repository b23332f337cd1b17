"""`twinweight roofline` as a command: its flags, files written, 80 columns, one line for what cannot be read."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data" / "roofline"
OFF, ON = str(DATA / "cpu-off.json.gz"), str(DATA / "cpu-on.json.gz")
KEYS = ("op", "kind", "phase", "calls", "time_us", "share", "flops", "bytes", "tflops", "tbps", "roof_pct", "bound")


def run(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """In a process of its own, so that exit codes and streams are the shell's."""
    environ = {"COLUMNS": str(columns), "NO_COLOR": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", "from twinweight.cli import main; main()", "roofline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def test_the_flags_together(tmp_path: Path) -> None:
    files = tmp_path / "r.json", tmp_path / "sub" / "r.csv"
    done = run(
        ON, "--report-by-op", "--kind", "ALL", "--gpu", "gfx1151", "--top", "5", "--json", str(files[0]), "--csv", str(files[1])
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-2])) <= 80
    assert "aten::mm (twin)" in done.stdout
    assert "64x1152x384, gemm, prefill" in done.stdout
    assert "\x1b" not in done.stdout
    result = json.loads(files[0].read_text())
    assert result["gpu"]["name"] == "gfx1151"
    assert 0.98 <= result["attributed"] <= 1.0
    assert all(set(KEYS) <= set(row) for row in result["ops"])
    assert len(result["ops"]) > 5  # --top is for reading
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [r["op"] for r in rows] == [r["op"] for r in result["ops"]]
    assert float(rows[0]["time_us"]) == result["ops"][0]["time_us"]


@pytest.mark.parametrize(
    ("arguments", "expected", "missing"),
    [
        ((ON,), "w4a16, decode", "by op"),
        ((ON, "--report-by-op", "--kind", "w4a16"), "_weight_int4pack_mm", "aten::mm"),
        ((ON, "--report-by-op", "--kind", "all", "--phase", "decode"), "1x1152x384, w4a16", "prefill\n"),
        ((ON, "--report-by-op", "--kind", "W4A16", "--phase", "ALL"), "_weight_int4pack_mm", "aten::mm"),
        ((ON, "--report-by-op", "--kind", "All", "--phase", "Decode"), "1x1152x384, w4a16", "prefill\n"),
        ((OFF, ON), "-> aten::mm", "by op"),
        ((OFF, ON, "--report-by-op"), "vanished", "Traceback"),
    ],
)
def test_reports(arguments: tuple[str, ...], expected: str, missing: str) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert missing not in done.stdout.split("by kind", 1)[1]


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        (b"", (), 3, "found an empty file"),
        (b'{"traceEvents": [{"ph": "X", "cat": "ker', (), 3, "cut off"),
        (b"\x1f\x8b\x08\x00", (), 3, "intact gzip file"),
        (b'{"model_type": "llama"}', (), 3, "found JSON with 'model_type'"),
        (b'{"traceEvents": []}', (), 3, "no event of an op"),
        (None, (), 2, "No such file"),
        (b"[]", ("--gpu", "H300"), 2, "unknown GPU 'H300'; known: H100"),
        (b"[]", ("--kind", "gemms"), 2, "--kind is 'gemms', expected all, gemm,"),
        (b"[]", ("--phase", "warm-up"), 2, "--phase is 'warm-up'"),
        (b"[]", ("b.json", "c.json"), 2, "3 traces given"),
        (b"[]", ("--gpu-table", "none.json", "--gpu", "H100"), 2, "cannot read the GPU table"),
    ],
)
def test_one_clear_line(tmp_path: Path, content: bytes | None, arguments: tuple[str, ...], code: int, message: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    done = run(str(path), *arguments, columns=200)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("error:")
    assert done.stdout == ""


def test_a_directory_without_a_trace_is_a_bad_argument(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert (done.returncode, "no *.json" in done.stderr) == (2, True)
