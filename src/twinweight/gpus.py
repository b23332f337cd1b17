"""The GPUs we know: peak matrix rates, bandwidth and memory, each with its source.

The data is `gpus.json` beside this file. A file of the same layout adds to it, or replaces entries of it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from twinweight.errors import ConfigError

MEASURED = "measured"
"""The name that means: measure the machine at hand (`roofs.roof_by_name`)."""

DTYPES = ("bfloat16", "float16", "fp8", "int8", "tf32", "float32")
_VENDOR = re.compile(r":.*$|\b(nvidia|geforce|amd|instinct|radeon|tesla|graphics)\b|[^a-z0-9+]")


@dataclass(frozen=True)
class Gpu:
    """One device as a roof: its limits, and where each figure is from.

    memory_bytes: what is soldered on, before the driver takes its part. bandwidth: bytes/s.
    matrix: dtype name (`DTYPES`) -> dense FLOP/s (int8: op/s), without sparsity, with 32-bit accumulation.
    source: "memory", "bandwidth", "matrix" -> text.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    matrix: Mapping[str, float]
    aliases: tuple[str, ...]
    source: Mapping[str, str]

    def peak(self, dtype: str) -> float | None:
        """Dense FLOP/s for a dtype name; float16 and bfloat16 stand in for each other; None where it is not known."""
        other = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype)
        return self.matrix.get(dtype) or (self.matrix.get(other) if other else None)


def gpu(name: str, table: Path | None = None) -> Gpu:
    """A GPU by name or alias, whatever the case, spaces and dashes; vendor names may stand before it ("NVIDIA H200").

    table: a JSON file with more GPUs. Raises ConfigError that names the known ones.
    """
    known = load(table)
    for found in known.values():
        if same(found, name):
            return found
    raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(known)}, or {MEASURED!r} for the machine at hand")


def means_measured(name: str) -> bool:
    """Whether a name is `MEASURED`, which is no entry of a table."""
    return _key(name) == MEASURED


def same(found: Gpu, name: str) -> bool:
    """Whether a name, such as a driver gives, means this GPU; a measured roof is told by the name it ends with."""
    return _key(name) in (_key(found.name), _key(found.name).removeprefix(MEASURED), *map(_key, found.aliases))


def load(table: Path | None = None) -> dict[str, Gpu]:
    """All GPUs: the packaged ones, then those of `table`, which may replace some. Raises ConfigError for a bad file."""
    if table is None:
        return dict(_packaged())
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the GPU table {table}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"the GPU table {table} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"the GPU table {table} holds {type(entries).__name__}, expected an object of GPUs by name")
    mine = {name: _parse(name, entry, f"the GPU table {table}") for name, entry in entries.items()}
    # Theirs first: an alias that names one of ours then finds theirs.
    return {**mine, **{name: entry for name, entry in _packaged().items() if name not in mine}}


@functools.cache
def _packaged() -> Mapping[str, Gpu]:
    text = resources.files("twinweight").joinpath("gpus.json").read_text(encoding="utf-8")
    return {name: _parse(name, entry, "gpus.json") for name, entry in json.loads(text).items()}


def _parse(name: str, entry: object, where: str) -> Gpu:
    where = f"{where}, {name!r}"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: found {entry!r}, expected an object")
    fields = {"memory_gib", "bandwidth_gb_s", "matrix_tflops", "source", "aliases"}
    if unknown := sorted(set(entry) - fields):
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    rates = entry.get("matrix_tflops")
    if not isinstance(rates, Mapping) or not rates:
        raise ConfigError(f"{where}: matrix_tflops is {rates!r}, expected dense TFLOP/s by dtype ({', '.join(DTYPES)})")
    if unknown := sorted(set(rates) - set(DTYPES)):
        raise ConfigError(f"{where}: unknown dtype {', '.join(unknown)}; known: {', '.join(DTYPES)}")
    aliases, source = entry.get("aliases", []), entry.get("source", "not given")
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise ConfigError(f"{where}: aliases is {aliases!r}, expected a list of names")
    if not isinstance(source, Mapping):
        source = dict.fromkeys(("memory", "bandwidth", "matrix"), str(source))
    return Gpu(
        name=name,
        memory_bytes=int(_positive(entry, "memory_gib", where) * 2**30),
        bandwidth=_positive(entry, "bandwidth_gb_s", where) * 1e9,
        matrix={dtype: _positive(rates, dtype, where) * 1e12 for dtype in rates},
        aliases=tuple(aliases),
        source=dict(source),
    )


def _positive(entry: Mapping[str, Any], field: str, where: str) -> float:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{where}: {field} is {value!r}, expected a number above 0")
    return float(value)


def _key(name: str) -> str:
    return _VENDOR.sub("", name.strip().lower())
