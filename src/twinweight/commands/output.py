"""What commands share in writing results."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from twinweight.errors import ConfigError

if TYPE_CHECKING:
    from twinweight.page import Page


def check_files(*files: Path | None, html: Path | None = None, plot: Path | None = None) -> None:
    """Before anything is measured: raise ConfigError where a file could not be written in the end, or a plot not drawn, or
    where one file is named twice.
    """
    if html is not None or plot is not None:
        from twinweight.plots import canvas

        canvas.require()
        if plot is not None and plot.suffix.lower() not in canvas.FORMATS:
            raise ConfigError(f"cannot write {plot}: expected {', '.join(canvas.FORMATS[:-1])} or {canvas.FORMATS[-1]}")
    seen: set[Path] = set()
    for file in (*files, html, plot):
        if file is None:
            continue
        if file.is_dir():
            raise ConfigError(f"cannot write {file}: it is a directory")
        if file.resolve() in seen:
            raise ConfigError(f"cannot write {file}: two options name it")
        seen.add(file.resolve())
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from error


def stamp(result: dict[str, Any]) -> dict[str, Any]:
    """The result with the command that made it; and with versions and date, unless it says what it was measured on."""
    return {"environment": environment(), **result, "command": shlex.join(["twinweight", *sys.argv[1:]])}


def environment() -> dict[str, Any]:
    """Versions and date."""
    from importlib.metadata import version

    import twinweight

    return {
        "python": platform.python_version(), "torch": version("torch"), "twinweight": twinweight.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def write_json(out: Console, file: Path | None, result: dict[str, Any]) -> None:
    """Write a result where a file is given, and say so. Raises ConfigError where it cannot be written."""
    if file is not None:
        write_text(out, file, json.dumps(result, indent=1) + "\n")


def write_html(out: Console, file: Path, page: Page) -> None:
    """Write a page, and say so. Raises ConfigError where it cannot be written."""
    write_text(out, file, page.html())


def write_text(out: Console, file: Path, text: str) -> None:
    """Write a file, and say so. Raises ConfigError where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    say(out, f"written: {file}")


def say(out: Console, text: str) -> None:
    """Print a line as it is, however long."""
    out.print(text, soft_wrap=True, highlight=False, markup=False)
