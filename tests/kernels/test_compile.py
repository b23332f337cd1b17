"""Every kernel compiles for every GPU we name, on matrix instructions and without spilled registers. None of it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.compile_targets import unsettled

SCRIPT = Path(__file__).parent / "compile_targets.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100", "gfx1151", "gfx1201")
MATRIX = {"sm_90": "wgmma", "gfx942": "mfma", "gfx1100": "wmma", "gfx1151": "wmma", "gfx1201": "wmma"}
KERNELS = {"int4", "int4-16", "fused", "expand", "recover"}
AMPERE = {"int4-wide", "int4-plain", "int4-32"}
HOPPER = {"fused-96", "fused-wide", "fused-half", "fused-features", "fused-plain"}
FEW_ROWS = {"int4", "int4-wide"}  # of `ampere.py` on NVIDIA, where K and groups are whole steps; with "int4-16" before Hopper

Row = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """target -> rows, from two processes for all (in this one Triton may be the interpreter): Hopper takes half of the time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    halves = ["sm_90"], [target for target in TARGETS if target != "sm_90"]
    commands = [[sys.executable, str(SCRIPT), *targets] for targets in halves]
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
    more = (AMPERE if target.startswith("sm") else set()) | (HOPPER if target == "sm_90" else set())
    assert {row["kernel"] for row in rows} == KERNELS | more
    assert len({row["shape"] for row in rows}) == 2
    assert {row["dtype"] for row in rows} == {"bf16", "fp16"}
    assert {row["symmetric"] for row in rows} == {True, False}
    for row in rows:
        assert row.get("trap", 0) == 0, row  # how Triton compiles what does not fit Blackwell's tensor memory
        # Hopper's products may leave some outside of their loop: they hold sums of up to 128 registers a lane.
        assert row["spills"] <= (160 if row["kernel"] in HOPPER | {"fused"} else 32) * target.startswith("sm"), row
        # The sums of 128 rows by 256 features and their weights, two steps of it, take all registers; a turn has 4 steps.
        assert row.get("loop_spills", 0) <= (2 * 4 if row["kernel"] == "fused-features" and row["symmetric"] else 0), row


@pytest.mark.parametrize("target", TARGETS)
def test_products_use_matrix_instructions(target: str, compiled: dict[str, list[Row]]) -> None:
    for row in compiled[target]:
        if row["kernel"] not in ("expand", "recover"):
            # Few rows take the narrow product that Hopper shares with GPUs before it.
            narrow = target == "sm_90" and row["kernel"] in FEW_ROWS | {"int4-plain"}
            kind = "matrix" if narrow else MATRIX.get(target, "matrix")
            assert row.get(kind, 0) > 0, row


@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("sm")])
def test_few_rows_have_streams_of_their_own(target: str, compiled: dict[str, list[Row]]) -> None:
    """Words do not pass through shared memory, and a copy of x follows a barrier, behind which nobody reads what it writes."""
    few = FEW_ROWS if target == "sm_90" else {*FEW_ROWS, "int4-16"}
    rows = [row for row in compiled[target] if row["kernel"] in few and row["shape"] == "g128"]
    assert rows
    assert all(row["racing"] == 0 for row in rows), rows
    assert all(row["shared"] <= 2 * 2 * 16 * 128 * 2 for row in rows), rows  # two turns of two steps of 16 rows, no words
    assert all(row["spills"] <= 32 for row in rows), rows


def test_products_of_a_warp_group_race_with_no_copy(compiled: dict[str, list[Row]]) -> None:
    """Where 9 to 16 rows and their words pass through shared memory, a barrier comes before each copy: others may read yet."""
    rows = [row for row in compiled["sm_90"] if row["kernel"] == "int4-16" and row["shape"] == "g128"]
    assert rows
    assert all(row["wgmma"] and row["racing"] == row["loose"] == row["serialized"] == 0 for row in rows), rows
    assert all(row["shared"] <= 2 * 4 * (64 * 32 + 16 * 128) for row in rows), rows  # two turns of four steps, words and x
    assert all(row["spills"] <= 32 for row in rows), rows


def test_products_in_flight_are_left_alone(compiled: dict[str, list[Row]]) -> None:
    """On Hopper they read the weight from registers, which the next step writes, and add to sums, which the end reads.

    Where Triton places the waits none is in flight across steps, and no copy follows a wait without a barrier: it may be for
    one warp group alone (`fused.py`; with ragged rows no x is copied so, but words are).
    """
    rows = compiled["sm_90"]
    assert any(row["running"] for row in rows)
    assert all(row["unsettled"] == 0 for row in rows), [row for row in rows if row["unsettled"]]
    plain = [row for row in rows if row["kernel"] == "fused-plain" or row["shape"] != "g128"]
    assert plain
    assert all(row["running"] == 0 for row in plain)
    assert all(row["loose"] == 0 for row in plain if row["shape"] == "g128")


def test_products_are_left_to_run(compiled: dict[str, list[Row]]) -> None:
    """Where sums could be written outside the loop's products, ptxas waits after each: a third of the rate was lost so."""
    rows = [row for row in compiled["sm_90"] if row["kernel"] in HOPPER | {"fused"} and row["shape"] == "g128"]
    assert all(row["serialized"] == 0 for row in rows if row["running"]), rows


def test_copies_have_addresses_that_go_on_by_constants(compiled: dict[str, list[Row]]) -> None:
    """Integer instructions are scarce beside those that unpack. With addresses and masks of each copy there were 37 a step."""
    rows = [row for row in compiled["sm_90"] if row["running"] and row["shape"] == "g128"]
    assert len(rows) >= 10
    most = {row["kernel"]: 26 if row["kernel"] == "fused-half" else 13 for row in rows}  # two groups a step, and one
    assert all(row["loop_addresses"] <= 4 * most[row["kernel"]] for row in rows), rows  # 4 steps a turn


LOOP = """
.L_x_1:
    /*0010*/ HMUL2.BF16_V2 R88, R88, R12 ;
    /*0020*/ HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ;
    /*0030*/ WARPGROUP.DEPBAR.LE gsb0, {left} ;
    /*0040*/ @P0 BRA `(.L_x_1) ;
    /*0050*/ {after}
    /*0060*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0070*/ F2FP.BF16.F32.PACK_AB R0, R25, R24 ;
"""


@pytest.mark.parametrize(
    ("left", "after", "found"),
    [
        ("0x0", "IADD3 R1, R1, R2, RZ ;", 0),
        ("0x1", "IADD3 R1, R1, R2, RZ ;", 1),  # the next turn writes the weight that is still read
        ("0x0", "F2FP.BF16.F32.PACK_AB R0, R25, R24 ;", 0),
        ("0x1", "F2FP.BF16.F32.PACK_AB R0, R25, R24 ;", 2),  # and the sums are read
    ],
)
def test_what_is_not_left_alone_is_seen(left: str, after: str, found: int) -> None:
    assert unsettled(LOOP.format(left=left, after=after)) == found


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
