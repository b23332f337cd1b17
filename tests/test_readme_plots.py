"""The README's plots come from committed results, by a committed command."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.reports import ROOT

pytest.importorskip("matplotlib")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    out = tmp_path_factory.mktemp("images")
    script = runpy.run_path(str(ROOT / "benchmarks/readme_plots.py"))
    files: list[Path] = [script[name](out) for name in ("paths", "vllm")]
    return {file.name: ElementTree.parse(file).getroot() for file in files}


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_what_is_shown(made: dict[str, ElementTree.Element]) -> None:
    paths, vllm = words(made["paths.svg"]), words(made["vllm.svg"])
    assert {"int4", "fused", "stream", "twin, bfloat16", "twin, fp8-row", "marlin", "machete", "humming", "rows M"} <= set(
        paths
    )
    assert {"TTFT, int4 by Marlin", "TPOT, int4 by Machete", "off", "on", "512 x 1", "2,048 x 32"} <= set(vllm)
    assert any(text.endswith(" ms") for text in vllm)


def test_both_stand_on_white(made: dict[str, ElementTree.Element]) -> None:
    """A page behind them may be dark."""
    for root in made.values():
        assert root.tag == f"{SVG}svg"
        assert "fill: #ffffff" in (next(root.iter(f"{SVG}path")).get("style") or "")


def test_the_committed_ones_are_of_this_script(made: dict[str, ElementTree.Element]) -> None:
    for name, root in made.items():
        committed = ElementTree.parse(ROOT / "docs/images" / name).getroot()
        assert words(committed) == words(root), (
            f"run `python benchmarks/readme_plots.py`: docs/images/{name} is of other results"
        )
