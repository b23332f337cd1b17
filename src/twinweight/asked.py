"""What is asked for by name: given, in a variable of the environment, or neither."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from twinweight.errors import ConfigError


def one_of(what: str, value: str, names: Collection[str]) -> str:
    """`value`, one of these names. Raises ConfigError that lists them."""
    if not isinstance(value, str) or value not in names:
        raise ConfigError(f"{what} is {value!r}, expected one of {', '.join(names)}")
    return value


def given_or_set(
    what: str, given: str | None, variable: str, names: Collection[str], environ: Mapping[str, str] | None = None
) -> str:
    """`given`, else what the variable is set to, else "dense". environ: None for the process's.

    Raises ConfigError as `one_of` does, with the variable's name where it is from there.
    """
    if given is not None:
        return one_of(what, given, names)
    value = (os.environ if environ is None else environ).get(variable)
    return one_of(f"{variable}: {what}", value, names) if value else "dense"
