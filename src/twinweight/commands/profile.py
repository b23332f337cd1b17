"""`twinweight profile`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinweight.commands.options import Device, EngineArgs, KvFloor, Model, TwinDtype, Utilization, json_object
from twinweight.commands.output import check_files, say
from twinweight.errors import ConfigError


def profile(
    model: Model,
    out: Annotated[Path, typer.Option(help="directory for off.json.gz and on.json.gz")],
    engine: Annotated[str, typer.Option(help="hf (transformers, here) or vllm (servers in processes of their own)")] = "hf",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(min=2)] = 8,
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 1,
    mode: Annotated[str, typer.Option(help="soft or hard, of the arm that is on")] = "soft",
    twin_dtype: TwinDtype = None,
    device: Device = None,
    utilization: Utilization = 0.9,
    kv_floor: KvFloor = None,
    engine_args: EngineArgs = None,
    references: Annotated[
        bool, typer.Option(help="vllm on a GPU: record both without CUDA graphs too, to know what graphs replay")
    ] = True,
) -> None:
    """Record profiler traces of prefill and decode, off and on, for `twinweight roofline`."""
    from twinweight.plan import check_mode
    from twinweight.roofline.recording import Recipe
    from twinweight.twin import request

    if engine not in ("hf", "vllm"):
        raise ConfigError(f"--engine is {engine!r}, expected hf or vllm")
    if check_mode(mode) == "off":
        raise ConfigError("--mode is 'off', which is one of the two traces: expected soft or hard for the other")
    check_files(out / "off.json.gz")
    recipe = Recipe(prompt_tokens, output_tokens, batch)
    dtype = request(twin_dtype)
    with Console(stderr=True).status("loading") as status:

        def step(name: str) -> None:
            status.update(f"recording {name}")

        if engine == "vllm":
            if device is not None:
                raise ConfigError("--engine vllm takes no --device")
            from twinweight.engines.vllm.record import record as record_vllm

            settings = {"mode": mode, "dtype": dtype} | ({} if kv_floor is None else {"kv_floor": kv_floor})
            written = record_vllm(
                model, recipe, out, settings=settings, references=references and _has_gpu(), step=step,
                engine_args={"gpu_memory_utilization": utilization} | json_object("--engine-args", engine_args),
            )  # fmt: skip
        else:
            if engine_args is not None:
                raise ConfigError("--engine hf takes no --engine-args")
            from twinweight.engines.hf import load
            from twinweight.roofline.recording import record

            loaded = load(model, mode=mode, twin_dtype=dtype, device=device, utilization=utilization, kv_floor=kv_floor)
            written = record(loaded, recipe, out, step)
    console = Console()
    for path in written.values():
        say(console, f"written: {path}")
    say(console, f"compare: twinweight roofline {shlex.join(map(str, written.values()))} --report-by-op")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
