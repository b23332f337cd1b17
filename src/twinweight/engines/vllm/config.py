"""Settings of the plugin, from `--additional-config '{"twinweight": {...}}'` and TWINWEIGHT_* variables. Needs no vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from twinweight import cache, rounded, twin
from twinweight.errors import ConfigError
from twinweight.modes import switched
from twinweight.plan import Mode, check_mode
from twinweight.workload import Workload, from_metrics

KEY = "twinweight"
"""The key in vLLM's additional_config."""

_PREFIX = "TWINWEIGHT_"


@dataclass(frozen=True)
class Config:
    """What a server was asked for.

    mode: "off", "soft" (as many twins as fit) or "hard" (all, or start-up stops).
    dtype: "dense" (exact), or 8-bit twins besides: "int8" on a CPU, "fp8", "fp8-exact" or "fp8-row" on a GPU.
    head: "dense" (as it is), or on a CPU "int8": few rows of the output head go by 8 bits a weight, where that is faster.
    kv_floor: KV-cache tokens that twins may never take; None, and anything below, is max_model_len. Given, it says how much is
    needed, and twins may take the rest; else what is left of the cache grows dearer as they do (`plan.CACHE_PRICE`).
    activation_reserve_mib, graphs_reserve_mib: memory kept for the activation peak and for CUDA graphs; None is an estimate.
    crossover: rows from which a twin serves, instead of the measured number.
    workload: what twins are chosen for: prompt lengths, or a file with a server's saved /metrics (`from_metrics`); None
    is steps as large as the scheduler makes them.
    reload: whether weights may be replaced while the server runs, and sleep; if not, vLLM's own int4 weight goes where a copy
    of it serves every call.
    """

    mode: Mode = "off"
    dtype: str = "dense"
    head: str = "dense"
    kv_floor: int | None = None
    activation_reserve_mib: int | None = None
    graphs_reserve_mib: int | None = None
    crossover: int | None = None
    workload: tuple[int, ...] | str | None = None
    reload: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def planned_for(self, chunk: int) -> Workload:
        """What twins are chosen for, where steps have `chunk` rows at most. Prompts come with decode steps of one and of 8
        requests, which only count where something serves them faster than the inner kernel: an own copy, or a twin that wins
        there.
        """
        if isinstance(self.workload, str):
            return from_metrics(Path(self.workload), chunk)
        counts = {1: 64.0, 8: 16.0}
        for rows, share in Workload.serving(self.workload or (chunk,), chunk=chunk).calls:
            counts[rows] = counts.get(rows, 0.0) + share
        return Workload.of(counts)


_LEAST = {"kv_floor": 0, "activation_reserve_mib": 0, "graphs_reserve_mib": 0, "crossover": 1}
_CHOICES: Mapping[str, Callable[[str], str]] = {"mode": check_mode, "dtype": twin.check_request, "head": rounded.check_request}
_DEFAULTS = {f.name: f.default for f in fields(Config)}
FIELDS = tuple(_DEFAULTS)
VARIABLES = frozenset({_PREFIX + name.upper() for name in FIELDS} | {cache.VARIABLE})


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Those that are named like ours and are none of `VARIABLES`."""
    return sorted(v for v in environ if v.startswith(_PREFIX) and v not in VARIABLES)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields that TWINWEIGHT_<FIELD> variables set. Raises ConfigError naming the variable and its value."""
    found: dict[str, Any] = {}
    if (mode := switched(environ)) is not None:
        found["mode"] = mode
    for name in FIELDS:
        variable = _PREFIX + name.upper()
        if value := environ.get(variable):
            number = name not in _CHOICES and value.strip().isdigit()
            found[name] = _checked(name, int(value) if number else value, variable)
    return found


def resolve(additional: object, environ: Mapping[str, str]) -> Config:
    """The settings of a server: variables, and over them `additional_config["twinweight"]`.

    Raises ConfigError for an unknown field or variable, or a value that cannot be used.
    """
    given = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
    where = f"additional_config[{KEY!r}]"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}, expected an object such as {{'mode': 'soft'}}")
    if unknown := sorted(set(given) - set(FIELDS)):
        raise ConfigError(f"{where}: unknown field {', '.join(map(repr, unknown))}; known: {', '.join(FIELDS)}")
    checked = {name: _checked(name, value, f"{where}[{name!r}]") for name, value in given.items()}
    config = Config(**{**from_environment(environ), **checked})
    unknown = unknown_variables(environ)
    if unknown and config.mode != "off":
        raise ConfigError(f"unknown variable {', '.join(unknown)}; known: {', '.join(sorted(VARIABLES))}")
    return config


def _checked(name: str, value: object, where: str) -> object:
    if value is None:
        return _DEFAULTS[name]
    if name in _CHOICES:
        try:
            return _CHOICES[name](value)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if name == "reload":
        return _switch(value, where)
    if name == "workload":
        return _workload(value, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
        raise ConfigError(f"{where} is {value!r}, expected a whole number of at least {_LEAST[name]}")
    return value


def _switch(value: object, where: str) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if found is None:
        raise ConfigError(f"{where} is {value!r}, expected true or false")
    return found


def _workload(value: object, where: str) -> tuple[int, ...] | str:
    """Prompt lengths from a list or from text with commas, else the name of a file that can be read."""
    if isinstance(value, str) and not re.fullmatch(r"[\d\s,]+", value):
        try:
            from_metrics(Path(value))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        return value
    if isinstance(value, str):
        given: Sequence[object] = [int(v) if v.strip().isdigit() else v for v in value.split(",")]
    else:
        given = value if isinstance(value, list | tuple) else [value]
    lengths = tuple(v for v in given if type(v) is int and v > 0)  # True is an int, too
    if not given or len(lengths) < len(given):
        expected = "prompt lengths such as [512, 2048], or a file with a server's /metrics"
        raise ConfigError(f"{where} is {value!r}, expected {expected}")
    return lengths
