"""What `roofline` prints, shows on a page, and writes as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from twinweight.roofline import comparing
from twinweight.table import Report, Table

_COLUMNS = (
    "op", "shape", "kind", "phase", "path", "calls", "time_us", "share", "flops", "bytes", "tflops", "tbps", "roof_pct",
    "bound",
)  # fmt: skip
_FIGURES = ("calls", "time", "share", "TFLOP/s", "TB/s", "roof", "bound")
_WORDS = ("bound", "")


def headline(result: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    where = "GPU" if result["on"] == "gpu" else "CPU"
    how = result["attribution"]
    known = ", ".join(
        f"{how[key] * 100:.1f} % {text}"
        for key, text in (("launch", "by launch"), ("graph", "by replay"), ("name", "by kernel name"))
        if how[key]
    )
    phases = "; ".join(
        f"{p['phase']} {_ms(p['time_us'])} in {p['steps']} step{'s' if p['steps'] != 1 else ''}" + _rows(p["rows"])
        for p in result["phases"]
        if p["steps"]
    )
    roof = result["gpu"]
    against = f"roof: {roof['name']}, {roof['bandwidth'] / 1e12:.3g} TB/s" if roof else "no roof: name a GPU with --gpu"
    if roof and result["other_device"]:
        against += f" (recorded on {result['device']})"
    lines = f"{result['trace']}: {_ms(result['device_time_us'])} of {where} time, {result['attributed'] * 100:.1f} % attributed"
    return f"{lines} ({known or 'none'}); {against}" + (f"\n{phases}" if phases else "")


def _rows(rows: list[int]) -> str:
    if not rows:
        return ""
    return f" of {', '.join(map(str, rows[:4]))}{', ...' if len(rows) > 4 else ''} row{'s' if rows != [1] else ''}"


def kind_table(result: dict[str, Any]) -> Table:
    """A row a kind and phase."""
    rows = tuple((f"{row['kind']}, {row['phase']}", *_cells(row)) for row in result["kinds"])
    return Table("by kind", ("kind", *_FIGURES), rows, left=_WORDS)


def op_table(result: dict[str, Any], top: int) -> Table:
    """A row an op, shape and phase."""
    rows = []
    for row in result["ops"][:top]:
        path = f" ({row['path']})" if row["path"] else ""
        rows.append((f"{row['op']}{path}\n{_details(row)}", *_cells(row)))
    return Table("by op", ("op", *_FIGURES), tuple(rows), _more(result["ops"], top), left=_WORDS)


def diff_table(diff: dict[str, Any], rows: str, top: int) -> Table:
    """A row an op (rows "ops") or a kind (rows "kinds"), with its time before and after."""
    by_op = rows == "ops"
    title = f"{diff['before']} -> {diff['after']}, by {'op' if by_op else 'kind'}"
    cells = []
    for row in diff[rows][:top]:
        before, after = int(row["calls_before"]), int(row["calls_after"])
        cells.append((
            f"{row['op']}\n{_details(row)}" if by_op else f"{row['kind']}, {row['phase']}",
            f"{before:,}" if before == after else f"{before:,} -> {after:,}",
            _ms(row["time_us_before"]) if before else "",
            _ms(row["time_us_after"]) if after else "",
            f"{row['speedup']:.2f}x" if row["speedup"] else "",
            "" if row["change"] == "same" else row["change"],
        ))  # fmt: skip
    columns = ("op" if by_op else "kind", "calls", "before", "after", "speedup", "")
    return Table(title, columns, tuple(cells), _more(diff[rows], top), left=_WORDS)


def linear_table(diff: dict[str, Any], top: int) -> Table:
    """A row a linear's shape, by whatever op it is computed."""
    rows = []
    for row in diff["linears"][:top]:
        ops = [", ".join(row[name]) or "nothing" for name in ("ops_before", "ops_after")]
        what = ops[0] if ops[0] == ops[1] else f"{ops[0]} -> {ops[1]}"
        rows.append((
            f"{row['shape']}, {row['phase']}\n  {what}",
            f"{int(max(row['calls_before'], row['calls_after'])):,}",
            _ms(row["time_us_before"]),
            _ms(row["time_us_after"]),
            f"{row['speedup']:.2f}x" if row["speedup"] else "",
        ))  # fmt: skip
    return Table("linears by shape", ("MxNxK", "calls", "before", "after", "speedup"), tuple(rows))


def _more(rows: list[dict[str, Any]], top: int) -> tuple[str, ...]:
    return (f"{len(rows) - top} more rows; --top shows more",) if len(rows) > top else ()


def _details(row: dict[str, Any]) -> str:
    return "  " + ", ".join(v for v in (row["shape"], row["kind"], row["phase"]) if v)


def render(result: dict[str, Any], *, by_op: bool, top: int) -> Report:
    """All of one trace, or of two."""
    if "diff" not in result:
        kinds = kind_table(result)
        return Report((headline(result), kinds, op_table(result, top)) if by_op else (headline(result), kinds))
    diff = result["diff"]
    parts: list[Table | str] = [headline(result["before"]), headline(result["after"]), diff_table(diff, "kinds", top)]
    if by_op:
        parts.append(diff_table(diff, "ops", top))
    if diff["linears"]:
        parts.append(linear_table(diff, top))
    return Report((*parts, *comparing.swaps(diff)))


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV, all the columns that any of them has, unknown values empty."""
    out = io.StringIO()
    columns = _COLUMNS if rows and "path" in rows[0] else tuple(rows[0]) if rows else _COLUMNS
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['calls']:,}",
        _ms(row["time_us"]),
        f"{row['share'] * 100:.1f} %",
        _number(row["tflops"]) if row["flops"] else "",
        _number(row["tbps"]),
        f"{row['roof_pct']:.0f} %" if row["roof_pct"] is not None else "",
        row["bound"] or "",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "0"


def _ms(us: float) -> str:
    return f"{us / 1e3:,.2f} ms" if us < 1e6 else f"{us / 1e6:,.2f} s"
