"""`twinweight plan`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinweight.commands.options import Html, Json, KvFloor, Utilization
from twinweight.errors import BudgetError
from twinweight.report import plan_table


def plan(
    model: Annotated[str, typer.Argument(help="model directory, config.json, or a model's name (twinweight synth lists them)")],
    gpu: Annotated[str, typer.Option(help="h200, rtx4090, strix-halo, ...; an unknown name lists them")],
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the model (tensor parallel)")] = 1,
    utilization: Utilization = 0.9,
    max_model_len: Annotated[int | None, typer.Option(help="default: the KV floor, else the model's maximum")] = None,
    kv_floor: KvFloor = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="default: vLLM's")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="default: vLLM's")] = None,
    mode: Annotated[str | None, typer.Option(help="soft or hard: show only this, and fail where it does not fit")] = None,
    from_metrics: Annotated[
        Path | None, typer.Option(help="plan for what a server saw: its /metrics, or its calls as JSON", show_default=False)
    ] = None,
    json_file: Json = None,
    html_file: Html = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot here: memory by mode")] = None,
) -> None:
    """Say what each mode would give on a GPU, from a config.json alone: twins, KV cache, prefill speed."""
    from twinweight import pages, planner, plots
    from twinweight.commands.output import check_files, say, stamp, write_html, write_json
    from twinweight.plan import check_mode
    from twinweight.workload import from_metrics as read

    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = check_mode(mode) if mode is not None else None
    out = Console()
    check_files(json_file, html=html_file, plot=plot)
    workload = read(from_metrics, max_num_batched_tokens) if from_metrics is not None else None
    ask = planner.Request(gpu, tp, utilization, max_model_len, kv_floor, max_num_batched_tokens, max_num_seqs, workload)
    seen = {"workload_from": str(from_metrics)} if from_metrics is not None else {}
    result = stamp(planner.plan_model(model, ask) | seen)
    out.print(plan_table(result, chosen))
    if plot is not None:
        plots.plan_plot(result, plot)
        say(out, f"written: {plot}")
    write_json(out, json_file, result)
    if html_file is not None:
        write_html(out, html_file, pages.plan_page(result, chosen))
    if chosen is not None and not result["modes"][chosen]["fits"]:
        verdict = result["verdicts"][chosen]
        raise BudgetError(f"mode {chosen} does not fit: {verdict}", missing=result["modes"][chosen]["missing_bytes"])
