"""Twinweight: W4A16 models that decode on int4 and prefill on a dense twin, inside a memory budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from twinweight.crossover import Crossovers as Crossovers
    from twinweight.engines.hf import load as load
    from twinweight.errors import TwinweightError as TwinweightError
    from twinweight.linear import Int4Linear as Int4Linear
    from twinweight.paths import Path as Path
    from twinweight.paths import Route as Route
    from twinweight.plan import Budget as Budget
    from twinweight.plan import Plan as Plan
    from twinweight.twins import build_twins as build_twins
    from twinweight.twins import drop_twins as drop_twins
    from twinweight.weight import Int4Weight as Int4Weight

_HOME = {
    "Budget": ("plan", "Budget"), "Crossovers": ("crossover", "Crossovers"), "Int4Linear": ("linear", "Int4Linear"),
    "Int4Weight": ("weight", "Int4Weight"), "Path": ("paths", "Path"), "Plan": ("plan", "Plan"), "Route": ("paths", "Route"),
    "TwinweightError": ("errors", "TwinweightError"), "build_twins": ("twins", "build_twins"),
    "drop_twins": ("twins", "drop_twins"), "load": ("engines.hf", "load"),
}  # fmt: skip
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import on first use: `import twinweight` alone costs nothing, and needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'twinweight' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(f"twinweight.{module}"), attribute)
