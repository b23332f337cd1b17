"""Read a Chrome trace event by event, plain or gzip, in constant memory.

The file is an object whose `traceEvents` is a list, or that list itself. Python's own decoder parses one event at a time out
of a window on the text.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from twinweight.errors import ConfigError, TraceError

_CHUNK = 1 << 22
_LARGEST = 1 << 26  # characters a single value may take: a longer one is a damaged file, not an event
_GAP = re.compile(r"[\s,:]*")
_EXPECTED = "a trace of torch.profiler (Chrome JSON with traceEvents)"

Progress = Callable[[float], None]


def events(path: Path, header: dict[str, Any], progress: Progress | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace in the order of the file; its other fields land in `header` as they pass.

    progress: called with the share of the file that has been read. Raises ConfigError for a file that cannot be opened and
    TraceError for one that is empty, cut off, damaged or not a trace.
    """
    try:
        with path.open("rb") as raw:
            yield from _parse(path, raw, header, progress or (lambda share: None))
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise TraceError(file=path, expected="an intact gzip file", found=str(error)) from error
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise TraceError(file=path, expected="an intact gzip file", found=f"{error}; was recording cut off?") from error


class _Window:
    """A moving window on the text: `text` from `at` on has not been consumed."""

    def __init__(self, path: Path, raw: IO[bytes], progress: Progress) -> None:
        self.path, self.raw, self.progress = path, raw, progress
        self.size = max(1, path.stat().st_size)
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        binary = gzip.GzipFile(fileobj=raw) if packed else raw
        self.stream = io.TextIOWrapper(binary, encoding="utf-8", errors="replace")
        self.text, self.at, self.ended = "", 0, False
        self.decode = json.JSONDecoder(strict=False).raw_decode

    def more(self) -> None:
        """Drop what was consumed and read on; a value that does not fit doubles the window."""
        rest = self.text[self.at :]
        if len(rest) > _LARGEST:
            raise TraceError(file=self.path, expected=_EXPECTED, found="text that is not JSON")
        chunk = self.stream.read(max(_CHUNK, len(rest)))
        self.text, self.at, self.ended = rest + chunk, 0, not chunk
        self.progress(min(1.0, self.raw.tell() / self.size))

    def peek(self) -> str:
        """The next character that is not blank, comma or colon; "" at the end of the file."""
        while True:
            end = self.at = _GAP.match(self.text, self.at).end()  # type: ignore[union-attr]
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any:
        """The next JSON value. Raises TraceError where the file ends, or breaks, within it."""
        self.peek()
        while True:
            try:
                found, end = self.decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError):
                if self.ended:
                    raise
            else:
                if end < len(self.text) or self.ended:
                    self.at = end
                    return found
            self.more()


def _parse(path: Path, raw: IO[bytes], header: dict[str, Any], progress: Progress) -> Iterator[dict[str, Any]]:
    window = _Window(path, raw, progress)
    first, count, seen = window.peek(), 0, False
    if not first:
        raise TraceError(file=path, expected=_EXPECTED, found="an empty file")
    try:
        if first == "[":
            seen = True
            for event in _array(window):
                count += 1
                yield event
        elif first == "{":
            window.at += 1
            while (mark := window.peek()) == '"':
                key = window.value()
                if key == "traceEvents" and window.peek() == "[":
                    seen = True
                    for event in _array(window):
                        count += 1
                        yield event
                else:
                    header[key] = window.value()
            if mark != "}" and seen:
                raise json.JSONDecodeError("cut off", "", 0)
    except (json.JSONDecodeError, RecursionError) as error:
        if not seen and not header:
            raise TraceError(file=path, expected=_EXPECTED, found=f"text that is not JSON: {window.text[:20]!r}") from error
        found = f"a file that ends or breaks after {count:,} events; was recording cut off?"
        raise TraceError(file=path, expected="a complete trace", found=found) from error
    if not seen:
        known = f"JSON with {', '.join(map(repr, list(header)[:4]))}" if header else f"text that begins {window.text[:20]!r}"
        raise TraceError(file=path, expected=_EXPECTED, found=known)


def _array(window: _Window) -> Iterator[dict[str, Any]]:
    window.at += 1
    while (mark := window.peek()) != "]":
        if not mark:
            raise json.JSONDecodeError("cut off", "", 0)
        event = window.value()
        if isinstance(event, dict):
            yield event
    window.at += 1
