"""The mode that the environment asks for."""

from __future__ import annotations

from collections.abc import Mapping

from twinweight.errors import ConfigError
from twinweight.plan import Mode, check_mode

VARIABLE = "TWINWEIGHT_MODE"
PREFILL_SWITCH = "VLLM_W4A16_PREFILL_BF16"
"""The variable this project started from: 1 means mode `soft`, 0 `off`."""


def from_environment(environ: Mapping[str, str]) -> Mode:
    """`VARIABLE`, else what `PREFILL_SWITCH` says, else `soft`. Raises ConfigError naming the variable and its value."""
    if value := environ.get(VARIABLE):
        try:
            return check_mode(value)
        except ConfigError as error:
            raise ConfigError(f"{VARIABLE}: {error}") from None
    return switched(environ) or "soft"


def switched(environ: Mapping[str, str]) -> Mode | None:
    """What `PREFILL_SWITCH` says; None where it is not set. Raises ConfigError for another value than 0 and 1."""
    value = environ.get(PREFILL_SWITCH, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{PREFILL_SWITCH} is {value!r}, expected 0 or 1")
    return {"": None, "0": "off", "1": "soft"}[value]
