"""Plots, from the dictionaries that `--json` writes: each panel is data and a function that draws it, for files and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tune_plot(result: dict[str, Any], file: Path) -> None:
    """Time against rows, log-log, a panel a shape and a line a path; takeovers of the best twin's route are marked."""
    from twinweight.plots.canvas import save
    from twinweight.plots.tune import panels

    save(panels(result), file, result["device"]["name"])


def plan_plot(result: dict[str, Any], file: Path) -> None:
    """Memory of one GPU, a bar a mode: weights, twins, KV cache, reserves, what is kept free."""
    from twinweight.plots.canvas import save
    from twinweight.plots.plan import panels

    save(panels(result), file)
