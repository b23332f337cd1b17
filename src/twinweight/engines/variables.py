"""TWINWEIGHT_* variables that the embedded engine does not read: misspelt ones, and those of the vLLM plugin alone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

from twinweight import cache, modes, rounded, twin

log = logging.getLogger("twinweight")

READ = (cache.VARIABLE, twin.VARIABLE, rounded.VARIABLE, modes.VARIABLE)


def warn_of_others(environ: Mapping[str, str]) -> None:
    """Say, once a process, which variables are ignored here."""
    from twinweight.engines.vllm.config import VARIABLES, unknown_variables

    plugins = sorted(VARIABLES.difference(READ))
    if unknown := unknown_variables(environ):
        known = f"known: {', '.join(READ)}; to the vLLM plugin alone: {', '.join(plugins)}"
        _warn(f"unknown variable {', '.join(unknown)} is ignored; {known}")
    if unread := [v for v in plugins if environ.get(v)]:
        _warn(f"{', '.join(unread)}: only the vLLM plugin reads this, here it is ignored")


@functools.cache
def _warn(text: str) -> None:
    log.warning("%s", text)
