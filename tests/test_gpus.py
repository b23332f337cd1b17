"""The GPU table: names, units, extension by a file, and the measured roof."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from twinweight import gpus
from twinweight.errors import ConfigError

NAMES = [
    ("NVIDIA H200", "H200"),
    ("h100", "H100"),
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H100 NVL", "H100 NVL"),
    ("NVIDIA B200", "B200"),
    ("NVIDIA A100-SXM4-80GB", "A100"),
    ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
    ("NVIDIA L40S", "L40S"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("rtx5090", "RTX 5090"),
    ("AMD Instinct MI300X", "MI300X"),
    ("AMD Instinct MI325X", "MI325X"),
    ("mi355x", "MI355X"),
    ("AMD Radeon RX 7900 XTX", "gfx1100"),
    ("strix-halo", "gfx1151"),
    ("Strix Halo", "gfx1151"),
    ("Radeon 8060S Graphics", "gfx1151"),
    ("gfx1151:xnack-", "gfx1151"),
    ("AMD Radeon RX 9070 XT", "gfx1201"),
]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_names_and_aliases(name: str, expected: str) -> None:
    assert gpus.gpu(name).name == expected


@pytest.mark.parametrize(
    "name", ["", "AMD Radeon Graphics", "H300", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"]
)
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU .*H100.*gfx1151.*measured"):
        gpus.gpu(name)


def test_no_two_gpus_share_a_name() -> None:
    keys = [gpus._key(n) for g in gpus.load().values() for n in (g.name, *g.aliases)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", gpus.load())
def test_figures_are_plausible_and_sourced(name: str) -> None:
    """An 8-bit rate is once or twice, on GeForce cards four times, the 16-bit one: a figure with sparsity would stand out."""
    g = gpus.gpu(name)
    assert set(g.source) == {"memory", "bandwidth", "matrix"}
    assert all(g.source.values())
    assert 16 << 30 <= g.memory_bytes <= 288 << 30
    assert 250e9 <= g.bandwidth <= 8000e9
    assert g.matrix["bfloat16"] == g.matrix["float16"]
    consumer = name.startswith("RTX")
    assert round(g.matrix["int8"] / g.matrix["float16"]) in ((4,) if consumer else (1, 2))
    assert "fp8" not in g.matrix or round(g.matrix["fp8"] / g.matrix["float16"]) == 2


# Units (SMs or CUs), dense 16-bit operations a clock and unit with 32-bit accumulation, boost clock in GHz.
ENGINES = [
    ("H100", 132, 4096, 1.83),
    ("A100", 108, 2048, 1.41),
    ("L40S", 142, 1024, 2.52),
    ("RTX 3090", 82, 512, 1.695),
    ("RTX 4090", 128, 512, 2.52),
    ("RTX 5090", 170, 512, 2.407),
    ("MI300X", 304, 2048, 2.1),
    ("MI355X", 256, 4096, 2.4),
    ("gfx1100", 96, 512, 2.5),
    ("gfx1151", 40, 512, 2.9),
    ("gfx1201", 64, 1024, 2.97),
    ("R9700", 64, 1024, 2.92),
]


@pytest.mark.parametrize(("name", "units", "ops", "ghz"), ENGINES)
def test_rates_follow_from_units_and_clock(name: str, units: int, ops: int, ghz: float) -> None:
    """The L40S's datasheet is 1.2% below this product; all others round to it."""
    assert gpus.gpu(name).matrix["float16"] == pytest.approx(units * ops * ghz * 1e9, rel=0.013 if name == "L40S" else 0.003)


@pytest.mark.parametrize(
    ("name", "bits", "gbit"),
    [
        ("L40S", 384, 18),
        ("RTX 3090", 384, 19.5),
        ("RTX 4090", 384, 21),
        ("RTX 5090", 512, 28),
        ("gfx1100", 384, 20),
        ("gfx1151", 256, 8),
        ("gfx1201", 256, 20),
        ("R9700", 256, 20),
    ],
)
def test_bandwidth_follows_from_the_bus(name: str, bits: int, gbit: float) -> None:
    assert gpus.gpu(name).bandwidth == pytest.approx(bits / 8 * gbit * 1e9)


def test_peak_takes_the_other_16_bit_type() -> None:
    h200 = gpus.gpu("h200")
    assert h200.peak("bfloat16") == h200.peak("float16") == pytest.approx(989.4e12)
    assert gpus.gpu("a100").peak("fp8") is None


ENTRY: dict[str, Any] = {"memory_gib": 8, "bandwidth_gb_s": 100, "matrix_tflops": {"float16": 10}}


def test_a_file_adds_and_replaces(tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    table.write_text(json.dumps({"Toy": {**ENTRY, "aliases": ["strix-halo"], "source": "a guess"}, "H200": ENTRY}))
    toy = gpus.gpu("strix halo", table)
    assert (toy.name, toy.bandwidth, toy.matrix, toy.source["matrix"]) == ("Toy", 100e9, {"float16": 10e12}, "a guess")
    assert toy.peak("bfloat16") == 10e12
    assert gpus.gpu("h200", table).memory_bytes == 8 << 30
    assert gpus.gpu("h100", table) == gpus.gpu("h100")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "memory_gib": 0}, "memory_gib is 0"),
        ({**ENTRY, "bandwidth_gb_s": "fast"}, "bandwidth_gb_s is 'fast'"),
        ({**ENTRY, "matrix_tflops": {}}, "matrix_tflops"),
        ({**ENTRY, "matrix_tflops": {"bf16": 1}}, "unknown dtype bf16"),
        ({**ENTRY, "bandwith": 1}, "unknown field bandwith"),
        ({**ENTRY, "aliases": "toy"}, "aliases"),
        ([], "expected an object"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, entry: object, message: str) -> None:
    table = tmp_path / "t.json"
    table.write_text(json.dumps({"Toy": entry}))
    with pytest.raises(ConfigError, match=message):
        gpus.gpu("Toy", table)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "expected an object"), (None, "cannot read")])
def test_bad_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    table = tmp_path / "t.json"
    if text is not None:
        table.write_text(text)
    with pytest.raises(ConfigError, match=message):
        gpus.load(table)


def test_the_table_is_packaged() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "*.json" in project["tool"]["setuptools"]["package-data"]["twinweight"]


def test_measured_roof_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinweight import roof

    monkeypatch.setattr(roof, "_SIDES", (256,))
    g = roof.measure(torch.device("cpu"))
    assert g.name == "measured CPU"
    assert 1e9 < g.matrix["float32"] < 1e14
    assert "fp8" not in g.matrix
    assert "tf32" not in g.matrix
    assert 1e8 < g.bandwidth < 1e12
    assert "threads" in g.source["matrix"]
