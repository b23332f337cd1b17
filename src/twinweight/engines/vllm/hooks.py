"""Methods of others that call ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def of_class(
    owner: Any, name: str, before: Callable[[Any], None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Call these around a method of a class: before(self), after(self, *arguments of the method). Once, however often asked."""
    original = getattr(owner, name)
    if hasattr(original, "twinweight"):
        return

    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(self)
        result = original(self, *args, **kwargs)
        if after is not None:
            after(self, *args, **kwargs)
        return result

    hooked.twinweight = True  # type: ignore[attr-defined]
    setattr(owner, name, hooked)


def of_object(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of this one object, where it has it, by around(method, *arguments)."""
    method = getattr(owner, name, None)
    if method is not None:
        setattr(owner, name, functools.wraps(method)(functools.partial(around, method)))
