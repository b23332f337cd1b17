"""`twinweight bench`."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from twinweight import modes, rounded, twin
from twinweight.commands.options import (
    Device,
    EngineArgs,
    Head,
    Html,
    Json,
    KvFloor,
    Mode,
    Model,
    TwinDtype,
    Utilization,
    json_object,
)
from twinweight.commands.output import check_files, stamp, write_html, write_json
from twinweight.errors import ConfigError
from twinweight.plan import Mode as ModeName
from twinweight.plan import check_mode


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
    engine_args: EngineArgs = None,
    mode: Mode = None,
    twin_dtype: TwinDtype = None,
    head: Head = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Measure off and on: time to first token, time per output token, memory."""
    prompts = _numbers("--prompt-tokens", prompt_tokens)
    if engine not in ("hf", "vllm"):
        raise ConfigError(f"--engine is {engine!r}, expected hf or vllm")
    chosen = modes.from_environment(os.environ) if mode is None else check_mode(mode)
    if chosen == "off":
        raise ConfigError("mode (--mode, TWINWEIGHT_MODE) is off, one of the two arms: expected soft or hard for the other")
    if engine == "vllm":
        if image is not None or batch != 1 or device is not None:
            raise ConfigError("--engine vllm takes --concurrency, and no --batch, --image or --device")
        points = tuple(itertools.product(prompts, _numbers("--concurrency", concurrency)))
        args = {"gpu_memory_utilization": utilization, **json_object("--engine-args", engine_args)}
        check_files(json_file, html=html_file)
        result = _vllm(model, (points, output_tokens, repeats), chosen, (twin_dtype, head), kv_floor, args, rounds)
    else:
        if len(prompts) > 1 or concurrency != "1" or rounds > 1 or engine_args is not None:
            raise ConfigError(
                "--engine hf takes one --prompt-tokens, --batch for --concurrency, and no --rounds or --engine-args"
            )
        from twinweight import bench as benchmark
        from twinweight.engines.hf import load

        workload = benchmark.Workload(prompts[0], output_tokens, batch, _size(image))
        check_files(json_file, html=html_file)
        with Console(stderr=True).status("loading") as status:
            loaded = load(
                model, mode=chosen, twin_dtype=twin_dtype, head=head, device=device, utilization=utilization, kv_floor=kv_floor
            )
            result = benchmark.bench(loaded, workload, repeats=repeats, step=lambda text: status.update(f"measuring {text}"))
    _show(stamp(result), json_file, html_file)


def _show(result: dict[str, Any], json_file: Path | None, html_file: Path | None) -> None:
    from twinweight import pages, report

    out = Console()
    out.print(report.vllm_bench_table(result) if "records" in result else report.bench_table(result))
    write_json(out, json_file, result)
    if html_file is not None:
        write_html(out, html_file, pages.bench_page(result))


def _vllm(
    model: Path,
    work: tuple[tuple[tuple[int, int], ...], int, int],
    mode: ModeName,
    eight_bits: tuple[str | None, str | None],
    kv_floor: int | None,
    engine_args: dict[str, Any],
    rounds: int,
) -> dict[str, Any]:
    from twinweight.engines.vllm.bench import Workload
    from twinweight.engines.vllm.bench import bench as serve

    twin_dtype, head = eight_bits
    with Console(stderr=True).status("starting vLLM") as status:
        return serve(
            model, Workload(*work), mode=mode, dtype=twin.request(twin_dtype), head=rounded.request(head), kv_floor=kv_floor,
            engine_args=engine_args, rounds=rounds, step=status.update,
        )  # fmt: skip


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) for p in parts):
        raise ConfigError(f"{option} is {text!r}, expected whole numbers of at least 1 such as 512,2048")
    return tuple(map(int, parts))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError(f"--image is {text!r}, expected WIDTHxHEIGHT such as 1280x720")
    return int(width), int(height)
