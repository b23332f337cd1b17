"""The command line. Commands print a table; `--json` writes the same as data; errors are one message and an exit code.

Exit codes: 0 done; 1 a check failed; 2 a bad argument or setting; 3 a damaged checkpoint; 4 a checkpoint that Twinweight does
not run; 5 twins that do not fit (mode hard); 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from twinweight import __version__, errors
from twinweight.commands.bench import bench
from twinweight.commands.demo import demo
from twinweight.commands.options import Device, Json, KvFloor, Mode, Model, TwinDtype, Utilization
from twinweight.commands.output import check_files, say, write_json
from twinweight.commands.plan import plan
from twinweight.commands.profile import profile
from twinweight.commands.roofline import roofline
from twinweight.commands.tune import tune

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="W4A16 models with dense twins for prefill."
)
out = Console()
err = Console(stderr=True)

EXIT_CODES: tuple[tuple[type[errors.TwinweightError], int], ...] = (
    (errors.ConfigError, 2),
    (errors.UnsupportedError, 4),
    (errors.CheckpointError, 3),
    (errors.BudgetError, 5),
    (errors.TwinweightError, 1),
)
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells say it


def main() -> None:
    """Entry point of the `twinweight` command."""
    debug = "--debug" in sys.argv
    args = [a for a in sys.argv[1:] if a != "--debug"]
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_time=False, show_path=False)]
    )
    try:
        app(args)
    except (KeyboardInterrupt, SystemExit) as ended:  # typer turns the first into the second, without a word
        if isinstance(ended, SystemExit) and ended.code != _INTERRUPTED:
            raise
        err.print("interrupted", highlight=False)
        sys.exit(_INTERRUPTED)
    except (errors.TwinweightError, OSError) as error:  # OSError: a full disk behind standard output, say
        if debug:
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1))


def _version(wanted: bool) -> None:
    if wanted:
        say(out, f"twinweight {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", help="say which this is", callback=_version, is_eager=True)] = False,
) -> None:
    """`--debug` may stand anywhere; `main` takes it off the line."""


@app.command()
def inspect(model: Model, json_file: Json = None) -> None:
    """Say what a checkpoint holds and what its twins would weigh, from headers alone."""
    from twinweight import inspection, report

    check_files(json_file)
    result = inspection.inspect(model)
    out.print(report.inspect_table(result))
    write_json(out, json_file, result)


@app.command()
def synth(
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="directory to write")],
    like: Annotated[str, typer.Option(help="a model whose shapes to take; an unknown name lists them")],
    layers: Annotated[int | None, typer.Option(help="keep only this many layers")] = None,
    group_size: Annotated[int, typer.Option(help="32, 64, 128 or -1 (one scale a row)")] = 128,
    asymmetric: Annotated[bool, typer.Option(help="with zero points")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    format_: Annotated[str, typer.Option("--format", help="compressed-tensors, gptq or awq")] = "compressed-tensors",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a random but valid W4A16 checkpoint of true shapes, for speed work without downloads."""
    from twinweight import presets
    from twinweight import synth as synthesis

    written = synthesis.write(
        presets.preset(like, layers), out_dir, seed=seed, group_size=group_size, symmetric=not asymmetric,
        dtype=dtype, format=format_,  # type: ignore[arg-type]
    )  # fmt: skip
    say(
        out,
        f"{out_dir}: {written.parameters / 1e9:.2f} B parameters, {written.quantized} int4 weights, "
        f"{written.nbytes / 2**30:.2f} GiB in {written.shards} file{'s' if written.shards != 1 else ''}",
    )


@app.command("load-check")
def load_check(
    model: Model,
    mode: Mode = None,
    twin_dtype: TwinDtype = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    json_file: Json = None,
) -> None:
    """Load a checkpoint, check that every path computes the same weight, run one forward pass."""
    from twinweight import inspection, report
    from twinweight.engines.hf import load

    check_files(json_file)
    loaded = load(model, mode=mode, twin_dtype=twin_dtype, device=device, utilization=utilization, kv_floor=kv_floor)
    result = inspection.check_loaded(loaded)
    out.print(report.check_table(result))
    write_json(out, json_file, result)
    if not result["ok"]:
        raise typer.Exit(1)


app.command()(bench)
app.command()(demo)
app.command()(plan)
app.command()(profile)
app.command()(roofline)
app.command()(tune)
