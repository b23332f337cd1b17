"""`twinweight roofline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from twinweight.errors import ConfigError


def roofline(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE...", help="one trace of torch.profiler, or two to compare", show_default=False),
    ],
    report_by_op: Annotated[bool, typer.Option("--report-by-op", help="a row an op and shape, not only a kind")] = False,
    kind: Annotated[
        str, typer.Option(help="ALL, gemm, w4a16, attention, moe, norm, elementwise, copy, embedding, sampling, ...")
    ] = "ALL",
    gpu: Annotated[str | None, typer.Option(help="the roof: H200, gfx1151, ... or measured; default: the trace's")] = None,
    gpu_table: Annotated[Path | None, typer.Option(help="a JSON file with more GPUs, as gpus.json")] = None,
    phase: Annotated[str, typer.Option(help="prefill, decode, other or all")] = "all",
    top: Annotated[int, typer.Option(min=1, help="rows of ops to print")] = 30,
    reference: Annotated[
        Path | None, typer.Option(help="a trace of the same model without CUDA graphs; default: NAME.eager.json beside")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here as JSON, all rows")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write the ops here as CSV, all rows")] = None,
) -> None:
    """Hold a profiler trace against the roofline, op by op; with two traces, say what changed."""
    from twinweight.roofline import tables
    from twinweight.roofline.run import roofline as analyse

    err = Console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def step(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(f"reading {name}", total=1.0)
            bar.update(tasks[name], completed=share)

        result = analyse(
            traces, gpu=gpu, gpu_table=gpu_table, kind=kind, phase=phase, reference=reference, progress=step
        )  # fmt: skip
    show(Console(), result, by_op=report_by_op, top=top)
    rows = result["diff"]["ops"] if "diff" in result else result["ops"]
    if csv_file is not None:
        _write(csv_file, tables.to_csv(rows))
    if json_file is not None:
        import json

        _write(json_file, json.dumps(result, indent=1) + "\n")


def show(out: Console, result: dict[str, Any], *, by_op: bool, top: int) -> None:
    """Print the result of `roofline.run.roofline`."""
    from twinweight.roofline import comparing, tables

    if "diff" not in result:
        shown = result | {"ops": result["ops"][:top], "left_out": max(0, len(result["ops"]) - top)}
        out.print(tables.render(shown, by_op=by_op))
        return
    for side in ("before", "after"):
        out.print(tables.headline(result[side]), highlight=False, soft_wrap=True)
    out.print(tables.diff_table(result["diff"], "kinds", top))
    if by_op:
        out.print(tables.diff_table(result["diff"], "ops", top))
    if result["diff"]["linears"]:
        out.print(tables.linear_table(result["diff"], top))
    for line in comparing.swaps(result["diff"]):
        out.print(line, highlight=False)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    Console().print(f"written: {file}")
