"""The command line. Commands print a table; `--json` writes the same as data; errors are one message and an exit code.

Exit codes: 0 done; 1 a check failed; 2 a bad argument or setting; 3 a damaged checkpoint; 4 a checkpoint that Twinweight does
not run; 5 twins that do not fit (mode hard).
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from twinweight import errors

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="W4A16 models with dense twins for prefill."
)
out = Console()
err = Console(stderr=True)

Model = Annotated[Path, typer.Argument(help="local model directory", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")]
Mode = Annotated[str | None, typer.Option(help="off, soft or hard; default: TWINWEIGHT_MODE, else soft")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one")]
Utilization = Annotated[float, typer.Option(help="share of the memory that may be used at all")]
KvFloor = Annotated[int | None, typer.Option(help="KV-cache tokens that twins may never take")]

EXIT_CODES: tuple[tuple[type[errors.TwinweightError], int], ...] = (
    (errors.ConfigError, 2),
    (errors.UnsupportedError, 4),
    (errors.CheckpointError, 3),
    (errors.BudgetError, 5),
    (errors.TwinweightError, 1),
)


def main() -> None:
    """Entry point of the `twinweight` command."""
    debug = "--debug" in sys.argv
    args = [a for a in sys.argv[1:] if a != "--debug"]
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)]
    )
    try:
        app(args)
    except errors.TwinweightError as error:
        if debug:
            raise
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))


@app.callback()
def root(debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False) -> None:
    """`--debug` may stand anywhere; `main` takes it off the line."""


@app.command()
def inspect(model: Model, json_file: Json = None) -> None:
    """Say what a checkpoint holds and what its twins would weigh, from headers alone."""
    from twinweight import inspection, report

    result = inspection.inspect(model)
    out.print(report.inspect_table(result))
    _write(json_file, result)


@app.command()
def synth(
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write")],
    like: Annotated[str, typer.Option(help="a model whose shapes to take; an unknown name lists them")],
    layers: Annotated[int | None, typer.Option(help="keep only this many layers")] = None,
    group_size: Annotated[int, typer.Option(help="32, 64, 128 or -1 (one scale a row)")] = 128,
    asymmetric: Annotated[bool, typer.Option(help="with zero points")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    format_: Annotated[str, typer.Option("--format", help="compressed-tensors, gptq or awq")] = "compressed-tensors",
    seed: int = 0,
) -> None:
    """Write a random but valid W4A16 checkpoint of true shapes, for speed work without downloads."""
    from twinweight import presets
    from twinweight import synth as synthesis

    written = synthesis.write(
        presets.preset(like, layers), out_dir, seed=seed, group_size=group_size, symmetric=not asymmetric,
        dtype=dtype, format=format_,  # type: ignore[arg-type]
    )  # fmt: skip
    out.print(
        f"{out_dir}: {written.parameters / 1e9:.2f} B parameters, {written.quantized} int4 weights, "
        f"{written.nbytes / 2**30:.2f} GiB in {written.shards} files",
        soft_wrap=True,
    )


@app.command("load-check")
def load_check(
    model: Model,
    mode: Mode = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    json_file: Json = None,
) -> None:
    """Load a checkpoint, check that every path computes the same weight, run one forward pass."""
    from twinweight import inspection, report
    from twinweight.engines.hf import load

    result = inspection.check_loaded(load(model, mode=mode, device=device, utilization=utilization, kv_floor=kv_floor))
    out.print(report.check_table(result))
    _write(json_file, result)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    output_tokens: Annotated[int, typer.Option(min=2)] = 32,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    image: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, for vision-language models")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    mode: Mode = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    json_file: Json = None,
) -> None:
    """Measure off and on, interleaved: time to first token, time per output token, memory."""
    from twinweight import bench as benchmark
    from twinweight import report
    from twinweight.engines.hf import load

    work = benchmark.Workload(prompt_tokens, output_tokens, batch, _size(image))
    with err.status("loading") as status:
        loaded = load(model, mode=mode, device=device, utilization=utilization, kv_floor=kv_floor)
        result = benchmark.bench(loaded, work, repeats=repeats, step=lambda text: status.update(f"measuring {text}"))
    out.print(report.bench_table(result))
    _write(json_file, result)


@app.command()
def demo(
    model: Annotated[Path, typer.Option(help="the trained model that ships with the repository")] = Path("models/stdlib-15m"),
    build: Annotated[Path, typer.Option(help="directory for the synthetic model and demo.json")] = Path("build"),
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 1024,
) -> None:
    """Show what a twin buys and what it costs: quality on a trained model, speed on a Qwen3-0.6B shape."""
    from twinweight import demo as demonstration
    from twinweight import report

    build.mkdir(parents=True, exist_ok=True)
    with err.status("quality of the trained model under int4, twin and both") as status:
        quality = demonstration.quality(model)
        out.print(report.quality_table(quality))
        status.update("writing and loading a synthetic Qwen3-0.6B")
        speed = demonstration.speed(
            build, repeats=repeats, prompt_tokens=prompt_tokens, step=lambda text: status.update(f"measuring {text}")
        )
    out.print(report.bench_table(speed))
    _write(build / "demo.json", {"quality": quality, "bench": speed})


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise errors.ConfigError(f"--image is {text!r}, expected WIDTHxHEIGHT such as 1280x720")
    return int(width), int(height)


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise errors.ConfigError(f"cannot write {file}: {error.strerror}") from error
    out.print(f"written: {file}")
