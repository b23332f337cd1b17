"""Arguments and options that several commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from twinweight.errors import ConfigError


def _directory(path: Path) -> Path:
    if not path.is_dir():
        found = "a file" if path.exists() else "none; a model of a hub has to be downloaded first"
        raise ConfigError(f"{path}: expected a local model directory, found {found}")
    return path


Model = Annotated[Path, typer.Argument(help="local model directory", show_default=False, callback=_directory)]
Json = Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")]
Html = Annotated[Path | None, typer.Option("--html", help="write a self-contained page here: summary, plots, tables")]
EngineArgs = Annotated[str | None, typer.Option(help="vllm: JSON, arguments of vllm.LLM for off and on")]
Mode = Annotated[str | None, typer.Option(help="off, soft or hard; default: TWINWEIGHT_MODE, else soft")]
TwinDtype = Annotated[
    str | None, typer.Option(help="dense, int8 (CPU), fp8, fp8-exact or fp8-row (GPU); default: TWINWEIGHT_DTYPE, else dense")
]
Head = Annotated[
    str | None,
    typer.Option(
        help="dense, or int8 (CPU): few rows of the output head by 8 bits a weight; default: TWINWEIGHT_HEAD, else dense"
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one")]
Utilization = Annotated[
    float,
    typer.Option(
        "--utilization", "--gpu-memory-utilization", help="share of the memory that may be used at all; vLLM's name too"
    ),
]
KvFloor = Annotated[int | None, typer.Option(help="KV-cache tokens that twins may never take")]


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """The value of an option that takes JSON; none is {}. Raises ConfigError where it is no object."""
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{option} is {text}, expected an object such as '{{\"enforce_eager\": true}}'")
    return found
