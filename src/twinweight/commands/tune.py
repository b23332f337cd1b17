"""`twinweight tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinweight.commands.options import Device, Html, Json, Model
from twinweight.report import tune_table


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
