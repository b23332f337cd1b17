"""What commands share in writing results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from twinweight.errors import ConfigError


def write_json(out: Console, file: Path | None, result: dict[str, Any]) -> None:
    """Write a result where a file is given, and say so. Raises ConfigError where it cannot be written."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    out.print(f"written: {file}", soft_wrap=True)
