"""What the ranks of a tensor-parallel group do together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from twinweight.engines.vllm import compat

T = TypeVar("T")


def joined(found: Mapping[str, str]) -> dict[str, str]:
    """What any rank found."""
    return {name: text for one in compat.gather(found) for name, text in one.items()}


def together(action: Callable[[], T]) -> T:
    """Run what may fail on one rank: the others must not wait for it in what follows. Raises on all where it fails on any."""
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    failures = compat.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if reasons := [f"rank {rank} failed: {text}" for rank, text in enumerate(failures) if text is not None]:
        raise RuntimeError("; ".join(reasons))
    return result
