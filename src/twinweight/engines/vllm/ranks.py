"""What the ranks of a tensor-parallel group do together. A rank that fails says so in place of what the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from twinweight.engines.vllm import compat

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    text: str


class OthersFailedError(RuntimeError):
    """Another rank failed, and has told all."""


def gather(value: Any) -> list[Any]:
    """The values of all ranks, by rank. Every rank must call it equally often. Raises OthersFailedError where one failed."""
    found = compat.gather(value)
    if reasons := [f"rank {rank} failed: {one.text}" for rank, one in enumerate(found) if isinstance(one, _Failure)]:
        raise OthersFailedError("; ".join(reasons))
    return found


def tell(error: Exception) -> None:
    """Let the ranks that wait in `gather` know of an error, where they do not know already."""
    if not isinstance(error, OthersFailedError):
        compat.gather(_Failure(f"{type(error).__name__}: {error}"))


def joined(found: Mapping[str, str]) -> dict[str, str]:
    """What any rank found."""
    return {name: text for one in gather(found) for name, text in one.items()}


def together(action: Callable[[], T]) -> T:
    """Run what may fail on one rank: the others must not wait for it in what follows. Raises on all where it fails on any."""
    try:
        result = action()
    except Exception as error:
        tell(error)
        raise
    gather(None)
    return result
