"""Panels as SVG inside pages and as files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import reports
from twinweight import plots
from twinweight.errors import ConfigError
from twinweight.plots import bench, canvas, plan, roofline, tune

pytest.importorskip("matplotlib")

COLOURS = {n: getattr(canvas, n) for n in ("BLUE", "ORANGE", "GREEN", "RED", "PURPLE", "BROWN", "TEAL", "PINK", "GREY")}


def luminance(colour: str) -> float:
    """WCAG 2: relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("ground", ["#ffffff", "#0f1318"])
def test_colours_stand_out_on_light_and_dark(name: str, ground: str) -> None:
    low, high = sorted((luminance(COLOURS[name]), luminance(ground)))
    assert (high + 0.05) / (low + 0.05) >= 3.0


def all_panels() -> list[canvas.Panel]:
    return [
        *tune.panels(reports.tune()), *plan.panels(reports.plan()), *bench.panels(reports.bench()),
        *bench.panels(reports.served()), *bench.panels(reports.served_at((512, 1), (8192, 8))),
        *roofline.panels(reports.traced("h200-eager-on")), *roofline.panels(reports.traced("cpu-off", "cpu-on")),
    ]  # fmt: skip


@pytest.mark.parametrize("panel", all_panels(), ids=lambda p: re.sub(r"\W+", "-", p.title)[:50])
def test_an_svg_can_stand_in_a_page(panel: canvas.Panel) -> None:
    text = canvas.svg(panel, "p1")
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label") == panel.alt
    assert len(panel.alt) > len(panel.title) > 0
    for word in ("http", "<?xml", "DOCTYPE", "metadata", "<style", "font-family", canvas._PAGE_INK):
        assert word not in text
    assert "currentColor" in text
    assert "<text" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("p1-") for name in ids)
    for name in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text):
        assert "".join(name) in ids


def test_equal_input_gives_an_equal_svg() -> None:
    panel = plan.panels(reports.plan())[0]
    assert canvas.svg(panel, "a") == canvas.svg(panel, "a")


def test_takeovers_are_marked() -> None:
    result = reports.tune()
    shape = result["shapes"][0]
    assert tune.best_form(shape) == "bfloat16"
    begins = {kind: int(text.rpartition(" from M=")[2]) for kind, text in shape["routes"].items()}
    assert f"twin from {begins['bfloat16']}" in canvas.svg(tune.panels(result)[0], "t")
    shape["saved_us"] = dict.fromkeys(shape["saved_us"], 0.0)
    assert tune.best_form(shape) == "none"
    assert f"stream from {begins['none']}" in canvas.svg(tune.panels(result)[0], "t")


def test_points_share_an_axis_and_keep_their_times() -> None:
    groups = bench.groups_of(reports.served_at((512, 1), (8192, 8))["records"], "ttft_ms")
    assert [g.label for g in groups] == ["512 x 1", "8,192 x 8"]
    assert groups[1].text == "8,192 x 8: off 81,920 ms, on 102,400 ms"
    assert bench.groups_of(reports.served()["records"][:1], "ttft_ms") == []  # off alone is no comparison


def test_a_trace_whose_work_is_unknown_has_no_scatter() -> None:
    result = reports.traced("h200-eager-on")
    for row in result["ops"]:
        row["flops"] = row["tflops"] = None
    assert [p.title for p in roofline.panels(result)] == ["h200-eager-on.json.gz: share of the time by kind"]
    assert roofline.panels(result | {"ops": [], "kinds": []}) == []


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files(tmp_path: Path, suffix: str) -> None:
    plots.plan_plot(reports.plan(), tmp_path / "sub" / f"plan.{suffix}")
    assert (tmp_path / "sub" / f"plan.{suffix}").stat().st_size > 1000
    with pytest.raises(ConfigError, match="cannot write"):
        plots.plan_plot(reports.plan(), tmp_path / "plan.nosuchformat")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"twinweight\[report\]"):
        canvas.require()


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.5, "0.5 us"), (999, "999 us"), (999.7, "1,000 us"), (1e3, "1 ms"), (2.5e6, "2.5 s"), (1234567890, "1,235 s")],
)
def test_durations(us: float, text: str) -> None:
    assert canvas.duration(us) == text
