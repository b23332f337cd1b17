"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(help="local model directory", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")]
Html = Annotated[Path | None, typer.Option("--html", help="write a self-contained page here: summary, plots, tables")]
Mode = Annotated[str | None, typer.Option(help="off, soft or hard; default: TWINWEIGHT_MODE, else soft")]
TwinDtype = Annotated[
    str | None, typer.Option(help="dense, int8 (CPU), fp8, fp8-exact or fp8-row (GPU); default: TWINWEIGHT_DTYPE, else dense")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one")]
Utilization = Annotated[float, typer.Option(help="share of the memory that may be used at all")]
KvFloor = Annotated[int | None, typer.Option(help="KV-cache tokens that twins may never take")]
