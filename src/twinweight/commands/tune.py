"""`twinweight tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from twinweight.commands.options import Device, Html, Json, Model
from twinweight.table import Report, Table

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def tune(
    model: Model,
    device: Device = None,
    check: Annotated[bool, typer.Option("--check", help="time the choices against the best on a finer grid")] = False,
    json_file: Json = None,
    html_file: Html = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot here: time against rows")] = None,
) -> None:
    """Measure which path is fastest from how many rows, per shape, into the cache that later starts read."""
    from twinweight import pages, plots
    from twinweight import tune as tuning
    from twinweight.commands.output import check_files, say, stamp, write_html, write_json

    out = Console()
    check_files(json_file, html=html_file, plot=plot)
    with Console(stderr=True).status("reading headers") as status:
        result = stamp(tuning.tune(model, device=device, check=check, step=lambda text: status.update(f"measuring {text}")))
    out.print(tune_table(result))
    if plot is not None:
        plots.tune_plot(result, plot)
        say(out, f"written: {plot}")
    write_json(out, json_file, result)
    if html_file is not None:
        write_html(out, html_file, pages.tune_page(result))


def tune_table(result: dict[str, Any]) -> Report:
    """A table a shape: time of every path by rows, the fastest marked; and the routes."""
    parts = [part for shape in result["shapes"] for part in (shape_table(shape), shape_routes(shape))]
    return Report((*parts, *closing(result)))


def shape_table(shape: dict[str, Any]) -> Table:
    """A row a number of rows M, a column a path."""
    kind = f"group {shape['group_size']}{'' if shape['symmetric'] else ' asym'}{' act-order' if shape['act_order'] else ''}"
    weights = f"{shape['count']} weight{'s' if shape['count'] != 1 else ''}"
    title = f"{shape['n']} x {shape['k']}, {kind}, {weights} (us, * the fastest)"
    choices = list(shape["points"][0]["us"])
    rows = tuple(
        (str(p["m"]), *(("* " if c == p["winner"] else "") + _us(p["us"][c]) for c in choices)) for p in shape["points"]
    )
    return Table(title, ("M", *map(_named, choices)), rows)


def shape_routes(shape: dict[str, Any]) -> str:
    """Which path from how many rows, a line a kind of twin."""
    routes = shape["routes"].items()
    return "\n".join(f"  {'no twin' if name == 'none' else name}: {text}" for name, text in routes)


def closing(result: dict[str, Any]) -> list[str]:
    """What was measured, where it is kept, and what the choices lose."""
    where = f"kept in {result['cache']}" if result["cache"] else "not kept (TWINWEIGHT_CACHE=off)"
    shapes = f"{len(result['shapes'])} shape{'s' if len(result['shapes']) != 1 else ''}"
    lines = [f"{result['device']['name']}: {shapes} in {result['seconds']} s, {where}"]
    if "regret" in result:
        found, points = result["regret"], result["points"]
        worst = max(points, key=lambda p: p["regret"], default=None)
        text = f"regret over {len(points)} points: geometric mean {found['geomean']:.3f}, worst {found['worst']:.3f}"
        if worst is not None:
            text += f" ({worst['n']} x {worst['k']} at M={worst['m']}: {worst['chosen']}, where {worst['best']} is best)"
        lines.append(text)
    return lines


def _named(choice: str) -> str:
    path, _, kind = choice.partition(":")
    return f"{path} {_SHORT.get(kind, kind)}".strip()


def _us(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
