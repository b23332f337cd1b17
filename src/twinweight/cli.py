"""The command line. Commands print a table; `--json` writes the same as data; errors are one message and an exit code.

Exit codes: 0 done; 1 a check failed; 2 a bad argument or setting; 3 a damaged checkpoint; 4 a checkpoint that Twinweight does
not run; 5 twins that do not fit (mode hard).
"""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from twinweight import errors
from twinweight.commands.plan import plan
from twinweight.commands.profile import profile
from twinweight.commands.roofline import roofline
from twinweight.commands.tune import tune

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="W4A16 models with dense twins for prefill."
)
out = Console()
err = Console(stderr=True)

Model = Annotated[Path, typer.Argument(help="local model directory", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")]
Mode = Annotated[str | None, typer.Option(help="off, soft or hard; default: TWINWEIGHT_MODE, else soft")]
TwinDtype = Annotated[
    str | None, typer.Option(help="dense, int8 (CPU), fp8, fp8-exact or fp8-row (GPU); default: TWINWEIGHT_DTYPE, else dense")
]
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
    twin_dtype: TwinDtype = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    json_file: Json = None,
) -> None:
    """Load a checkpoint, check that every path computes the same weight, run one forward pass."""
    from twinweight import inspection, report
    from twinweight.engines.hf import load

    loaded = load(model, mode=mode, twin_dtype=twin_dtype, device=device, utilization=utilization, kv_floor=kv_floor)
    result = inspection.check_loaded(loaded)
    out.print(report.check_table(result))
    _write(json_file, result)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model,
    engine: Annotated[str, typer.Option(help="hf (transformers, here) or vllm (servers in processes of their own)")] = "hf",
    prompt_tokens: Annotated[str, typer.Option(help="vllm takes several: 512,2048")] = "1024",
    output_tokens: Annotated[int, typer.Option(min=2)] = 32,
    batch: Annotated[int, typer.Option(min=1, help="hf: sequences at once")] = 1,
    concurrency: Annotated[str, typer.Option(help="vllm: requests at once, one or several: 1,8,32,64")] = "1",
    image: Annotated[str | None, typer.Option(help="hf: WIDTHxHEIGHT, for vision-language models")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="vllm: servers started for each of off and on, in turn")] = 1,
    engine_args: Annotated[str | None, typer.Option(help="vllm: JSON, arguments of vllm.LLM for off and on")] = None,
    mode: Mode = None,
    twin_dtype: TwinDtype = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    json_file: Json = None,
) -> None:
    """Measure off and on: time to first token, time per output token, memory."""
    prompts = _numbers("--prompt-tokens", prompt_tokens)
    if engine == "vllm":
        if image is not None or batch != 1 or device is not None:
            raise errors.ConfigError("--engine vllm takes --concurrency, and no --batch, --image or --device")
        _bench_vllm(
            model, (tuple(itertools.product(prompts, _numbers("--concurrency", concurrency))), output_tokens, repeats), mode,
            twin_dtype, kv_floor, {"gpu_memory_utilization": utilization, **_object("--engine-args", engine_args)}, rounds,
            json_file,
        )  # fmt: skip
        return
    if engine != "hf" or len(prompts) > 1 or concurrency != "1" or rounds > 1 or engine_args is not None:
        raise errors.ConfigError("--engine is hf or vllm; hf takes one --prompt-tokens, and --batch for --concurrency")
    from twinweight import bench as benchmark
    from twinweight import report
    from twinweight.engines.hf import load

    workload = benchmark.Workload(prompts[0], output_tokens, batch, _size(image))
    with err.status("loading") as status:
        loaded = load(model, mode=mode, twin_dtype=twin_dtype, device=device, utilization=utilization, kv_floor=kv_floor)
        result = benchmark.bench(loaded, workload, repeats=repeats, step=lambda text: status.update(f"measuring {text}"))
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


def _bench_vllm(
    model: Path,
    work: tuple[tuple[tuple[int, int], ...], int, int],
    mode: str | None,
    twin_dtype: str | None,
    kv_floor: int | None,
    engine_args: dict[str, Any],
    rounds: int,
    json_file: Path | None,
) -> None:
    from twinweight import report
    from twinweight.engines.hf import mode_from_environment
    from twinweight.engines.vllm.bench import Workload, bench
    from twinweight.plan import check_mode
    from twinweight.twin import check_request, request_from_environment

    chosen = mode_from_environment() if mode is None else check_mode(mode)
    dtype = request_from_environment() if twin_dtype is None else check_request(twin_dtype)
    with err.status("starting vLLM") as status:
        result = bench(
            model, Workload(*work), mode=chosen, dtype=dtype, kv_floor=kv_floor, engine_args=engine_args, rounds=rounds,
            step=status.update,
        )  # fmt: skip
    out.print(report.vllm_bench_table(result))
    result["command"] = shlex.join(["twinweight", *sys.argv[1:]])
    _write(json_file, result)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) for p in parts):
        raise errors.ConfigError(f"{option} is {text!r}, expected whole numbers of at least 1 such as 512,2048")
    return tuple(map(int, parts))


def _object(option: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise errors.ConfigError(f"{option} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.ConfigError(f"{option} is {text}, expected an object such as '{{\"enforce_eager\": true}}'")
    return found


app.command()(plan)
app.command()(profile)
app.command()(roofline)
app.command()(tune)


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
