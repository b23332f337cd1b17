"""Tables as data: aligned the same everywhere, and what commands print fits 80 columns."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from tests import reports
from twinweight import report
from twinweight.report import plan_table, tune_table
from twinweight.roofline.tables import render
from twinweight.table import Report, Table


def printed(shown: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, color_system=None)
    console.print(shown)
    return console.export_text()


def wide() -> dict[str, Any]:
    """`tune` of a GPU with every path there is."""
    result = reports.tune()
    more = {"fused": 23.1, "twin:fp8-row": 123456.7, "twin:fp8-exact": 9999.9}
    for point in result["shapes"][0]["points"]:
        point["us"] |= more
        del point["us"]["twin:float32"]
    return result | {"shapes": result["shapes"][:1]}


@pytest.mark.parametrize(
    "shown",
    [
        report.bench_table(reports.bench()),
        report.vllm_bench_table(reports.served_at((131072, 1), (131072, 128))),
        report.quality_table(reports.demo()["quality"]),
        tune_table(wide()),
        plan_table(reports.plan()),
        render(reports.traced("h200-eager-on"), by_op=True, top=30),
        render(reports.traced("h200-graphs-off", "h200-graphs-on"), by_op=True, top=30),
    ],
    ids=["bench", "vllm", "quality", "tune", "plan", "roofline", "roofline-two"],
)
def test_nothing_is_cut_at_80_columns(shown: Report) -> None:
    text = printed(shown)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    lines = text.splitlines()
    for table in (part for part in shown.parts if isinstance(part, Table)):
        heads = [line for line in lines if line.split() == " ".join(table.columns).split()]
        assert heads, table.columns  # the header is one line
        for row in table.rows:
            cells = " ".join(row[1:]).split()
            assert any(line.split()[-len(cells) :] == cells for line in lines), row  # so are a row's figures


@pytest.mark.parametrize("width", [30, 60])
def test_where_columns_do_not_fit_each_row_is_a_list(width: int) -> None:
    text = printed(plan_table(reports.plan()), width)
    assert max(len(line) for line in text.splitlines()) <= width
    modes = next(part for part in plan_table(reports.plan()).parts if isinstance(part, Table) and part.columns[0] == "mode")
    for name, *cells in modes.rows:
        found = text[text.index(f"\n{name}") :].split("\n")[2 : 2 + len(cells)]
        assert [line.strip() for line in found] == [f"{c}: {cell}" for c, cell in zip(modes.columns[1:], cells, strict=True)]


def test_alignment() -> None:
    names = Table("", ("name", "x", "why"), (("a", "1", "slow"), ("1", "20", "fast")), left=("why",))
    assert [names.aligned(i) for i in range(3)] == ["left", "right", "left"]
    assert Table("", ("M", "x"), (("1", "2"), ("1,024", "3"))).aligned(0) == "right"
    assert Table("", ("M", "x"), ()).aligned(0) == "left"
    assert printed(names).splitlines() == ["name   x  why ", "a      1  slow", "1     20  fast"]


def test_markup_of_the_console_is_text() -> None:
    assert "[red]x[/red]" in printed(Report((Table("[b]t[/b]", ("[i]c[/i]",), (("[red]x[/red]",),), ("[n]",)), "[red]y")))
    assert "[red]y" in printed(Report(("[red]y",)))


def test_the_fastest_is_marked() -> None:
    shape = tune_table(reports.tune()).parts[0]
    assert isinstance(shape, Table)
    assert shape.columns == ("M", "int4", "stream", "twin bf16", "twin fp32")
    assert shape.rows[0] == ("1", "* 444.1", "18,100", "2,319", "3,259")
    assert all(sum(cell.startswith("* ") for cell in row) == 1 for row in shape.rows)
