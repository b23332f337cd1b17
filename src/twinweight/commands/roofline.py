"""`twinweight roofline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from twinweight.commands.options import Html, Json
from twinweight.commands.output import check_files, stamp, write_html, write_json, write_text


def roofline(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE...", help="one trace of torch.profiler, or two to compare", show_default=False),
    ],
    report_by_op: Annotated[bool, typer.Option("--report-by-op", help="a row an op and shape, not only a kind")] = False,
    kind: Annotated[
        str, typer.Option(help="all, gemm, w4a16, attention, moe, norm, elementwise, copy, embedding, sampling, ...")
    ] = "all",
    gpu: Annotated[str | None, typer.Option(help="the roof: H200, gfx1151, ... or measured; default: the trace's")] = None,
    gpu_table: Annotated[Path | None, typer.Option(help="a JSON file with more GPUs, as gpus.json")] = None,
    phase: Annotated[str, typer.Option(help="all, prefill, decode or other")] = "all",
    top: Annotated[int, typer.Option(min=1, help="rows of ops to print")] = 30,
    reference: Annotated[
        Path | None, typer.Option(help="a trace of the same model without CUDA graphs; default: NAME.eager.json beside")
    ] = None,
    json_file: Json = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write the ops here as CSV, all rows")] = None,
    html_file: Html = None,
) -> None:
    """Hold a profiler trace against the roofline, op by op; with two traces, say what changed."""
    from twinweight import pages
    from twinweight.roofline import tables
    from twinweight.roofline.run import roofline as analyse

    check_files(json_file, csv_file, html=html_file)
    out, err = Console(), Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def step(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"reading {name}", total=1.0)
            bar.update(tasks[name], completed=share)

        result = analyse(traces, gpu=gpu, gpu_table=gpu_table, kind=kind, phase=phase, reference=reference, progress=step)
    result = stamp(result)
    out.print(tables.render(result, by_op=report_by_op, top=top))
    rows = result["diff"]["ops"] if "diff" in result else result["ops"]
    if csv_file is not None:
        write_text(out, csv_file, tables.to_csv(rows))
    write_json(out, json_file, result)
    if html_file is not None:
        write_html(out, html_file, pages.roofline_page(result, top))
