"""What `benchmarks/vllm_gpu.sh` would run on a GPU is understood by the script that it runs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reports import ROOT

# Stands for the Python with vLLM: writes down what it is asked for.
FAKE = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["ASKED"], "a") as f:
    f.write(json.dumps(sys.argv[1:]) + chr(10))
"""


def asked(tmp_path: Path, *words: str) -> list[list[str]]:
    """The command lines of a set, without the interpreter's name."""
    (tmp_path / "python3").write_text(FAKE)
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "asked").write_text("")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked")}
    subprocess.run([ROOT / "benchmarks/vllm_gpu.sh", "out.json", *words], env=env, check=True)
    return [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "model", "backend", "modes", "points"),
    [
        ("8b", "llama-3.1-8b", "auto", "off on", 5),
        ("32b-marlin wide", "qwen3-32b", "marlin", "off on", 5),
        ("70b-humming long on", "llama-3.3-70b", "humming", "on", 3),
        ("8b few bf16", "llama-3.1-8b", "auto", "bf16", 5),
        ("moe on", "qwen3-30b-a3b", "auto", "on", 5),
        ("fp8", "llama-3.1-8b", "auto", "off on", 5),
        ("tp2", "llama-3.1-8b", "auto", "off on", 5),
    ],
)
def test_a_set_asks_for_its_servers(words: str, model: str, backend: str, modes: str, points: int, tmp_path: Path) -> None:
    parser = runpy.run_path(str(ROOT / "benchmarks/vllm_gpu.py"))["arguments"]()
    lines = asked(tmp_path, *words.split())
    assert {line[0] for line in lines} == {"benchmarks/vllm_gpu.py"}
    found = [parser.parse_args(line[1:]) for line in lines]
    assert [a.mode for a in found] == modes.split()
    assert {(a.model, a.linear_backend, len(a.points), str(a.out)) for a in found} == {(model, backend, points, "out.json")}
    assert {(a.tp, a.twin_dtype) for a in found} == {(2 if words == "tp2" else 1, "fp8" if words == "fp8" else "dense")}


def test_the_life_of_a_server_is_a_set_and_others_are_refused(tmp_path: Path) -> None:
    assert asked(tmp_path, "life") == [["benchmarks/vllm_gpu_life.py", "out.json"]]
    with pytest.raises(subprocess.CalledProcessError):
        asked(tmp_path, "9b")
