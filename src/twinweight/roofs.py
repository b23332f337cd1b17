"""A roof by its name: a GPU of the table, or the machine at hand, measured."""

from __future__ import annotations

from pathlib import Path

from twinweight import gpus
from twinweight.gpus import Gpu


def roof_by_name(name: str, table: Path | None = None) -> Gpu:
    """`gpus.gpu`, or what `roof.measure` finds where the name is "measured", which takes some seconds."""
    if gpus.means_measured(name):
        from twinweight import roof  # torch, which a trace of another machine does not need

        return roof.measure()
    return gpus.gpu(name, table)
