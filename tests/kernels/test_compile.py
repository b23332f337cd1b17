"""Every kernel compiles for every GPU we name, on matrix instructions and without spilled registers. None of it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_targets.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100", "gfx1151", "gfx1201")
MATRIX = {"sm_90": "wgmma", "gfx942": "mfma", "gfx1100": "wmma", "gfx1151": "wmma", "gfx1201": "wmma"}
KERNELS = {"int4", "int4-16", "fused", "expand"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """target -> rows, from two processes for all (in this one Triton may be the interpreter)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    commands = [[sys.executable, str(SCRIPT), *TARGETS[first::2]] for first in (0, 1)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    lines = []
    for process in running:
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        lines += output.splitlines()
    rows: dict[str, list[Row]] = {target: [] for target in TARGETS}
    for line in lines:
        row = json.loads(line)
        rows[row["target"]].append(row)
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str, compiled: dict[str, list[Row]]) -> None:
    rows = compiled[target]
    assert {row["kernel"] for row in rows} - {"fused-wide"} == KERNELS
    assert len({row["shape"] for row in rows}) == 2
    assert {row["dtype"] for row in rows} == {"bf16", "fp16"}
    assert {row["symmetric"] for row in rows} == {True, False}
    for row in rows:
        assert row.get("trap", 0) == 0, row  # how Triton compiles what does not fit Blackwell's tensor memory
        assert row["spills"] <= (32 if target.startswith("sm") else 0), row


@pytest.mark.parametrize("target", TARGETS)
def test_products_use_matrix_instructions(target: str, compiled: dict[str, list[Row]]) -> None:
    for row in compiled[target]:
        if row["kernel"] != "expand":
            # Eight rows take the narrow product that Hopper shares with GPUs before it.
            kind = "matrix" if (target, row["kernel"]) == ("sm_90", "int4") else MATRIX.get(target, "matrix")
            assert row.get(kind, 0) > 0, row


def test_no_product_runs_on_into_the_next_step(compiled: dict[str, list[Row]]) -> None:
    """On Hopper they read the weight from registers, which the next step writes, and x from memory that the next copy writes,
    perhaps for warps that wait for themselves alone: see `fused.py`. (With ragged rows no x is copied so: what is, is words.)
    """
    assert any(row["kernel"] == "fused-wide" for row in compiled["sm_90"])
    assert all(row["running"] == 0 for row in compiled["sm_90"])
    assert all(row["loose"] == 0 for row in compiled["sm_90"] if row["shape"] == "g128")


@pytest.mark.parametrize("target", TARGETS)
def test_loads_are_wide(target: str, compiled: dict[str, list[Row]]) -> None:
    for row in compiled[target]:
        if row["shape"] == "g128":
            assert row["load16"] > 0, row


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("gfx")])
def test_unpacking_takes_few_instructions(target: str, compiled: dict[str, list[Row]]) -> None:
    for row in compiled[target]:
        if row["shape"] == "g128" and row["kernel"] == "fused":
            # Two weights an instruction in fp16; bf16 goes through fp32, as these GPUs have no arithmetic for it.
            assert row["per_weight"] <= (5 if row["dtype"] == "fp16" else 9), row
