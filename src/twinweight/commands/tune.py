"""`twinweight tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


def tune(
    model: Annotated[Path, typer.Argument(help="local model directory", show_default=False)],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one")] = None,
    check: Annotated[bool, typer.Option("--check", help="time the choices against the best on a finer grid")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot here: time against rows")] = None,
) -> None:
    """Measure which path is fastest from how many rows, per shape, into the cache that later starts read."""
    from twinweight import plots
    from twinweight import tune as tuning
    from twinweight.commands.output import write_json

    out = Console()
    with Console(stderr=True).status("reading headers") as status:
        result = tuning.tune(model, device=device, check=check, step=lambda text: status.update(f"measuring {text}"))
    out.print(tune_table(result))
    if plot is not None:
        plots.tune_plot(result, plot)
        out.print(f"written: {plot}")
    write_json(out, json_file, result)


def tune_table(result: dict[str, Any]) -> Group:
    """A table a shape: time of every path by rows, the winner marked; and the routes."""
    parts: list[Any] = []
    for shape in result["shapes"]:
        kind = f"group {shape['group_size']}{'' if shape['symmetric'] else ' asym'}{' act-order' if shape['act_order'] else ''}"
        title = f"{shape['n']} x {shape['k']}, {kind}, {shape['count']} weights (us)"
        table = Table(title=title, title_justify="left", header_style="bold")
        choices = list(shape["points"][0]["us"])
        for column in ("M", *(c.replace("twin:", "twin ") for c in choices), "winner"):
            table.add_column(column, justify="right")
        for point in shape["points"]:
            cells = (f"{point['us'][c]:,.1f}" for c in choices)
            table.add_row(str(point["m"]), *cells, point["winner"].replace("twin:", "twin "))
        routes = "\n".join(f"  {'no twin' if name == 'none' else name}: {text}" for name, text in shape["routes"].items())
        parts += [table, Text(routes)]
    where = f"kept in {result['cache']}" if result["cache"] else "not kept (TWINWEIGHT_CACHE=off)"
    parts.append(Text(f"{result['device']['name']}: {len(result['shapes'])} shapes in {result['seconds']} s, {where}"))
    if "regret" in result:
        found, points = result["regret"], result["points"]
        worst = max(points, key=lambda p: p["regret"], default=None)
        text = f"regret over {len(points)} points: geometric mean {found['geomean']:.3f}, worst {found['worst']:.3f}"
        if worst is not None:
            text += f" ({worst['n']} x {worst['k']} at M={worst['m']}: {worst['chosen']}, where {worst['best']} is best)"
        parts.append(Text(text))
    return Group(*parts)
