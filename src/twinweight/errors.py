"""The errors Twinweight raises, all below `TwinweightError`. Each says what was expected and what was found."""

import json
from pathlib import Path


class TwinweightError(Exception):
    """Base of every error that Twinweight raises on purpose."""


class ConfigError(TwinweightError):
    """A setting (argument, environment variable) has a value that cannot be used."""


class CheckpointError(TwinweightError):
    """A checkpoint is damaged or inconsistent: names the file as it was given, the tensor, what was expected and found."""

    def __init__(self, *, expected: str, found: str, file: str | Path | None = None, tensor: str | None = None) -> None:
        self.file = Path(file) if file is not None else None
        self.tensor = tensor
        self.expected = expected
        self.found = found
        where = [f"file {self.file}" if self.file else "", f"tensor {tensor}" if tensor else ""]
        super().__init__(f"{', '.join(w for w in where if w) or 'checkpoint'}: expected {expected}, found {found}")


class UnsupportedError(CheckpointError):
    """A valid checkpoint of a kind that Twinweight does not run (8-bit, activation quantization, ...)."""


class TraceError(CheckpointError):
    """A profiler trace that is empty, cut off, damaged, or no trace at all."""


class BudgetError(TwinweightError):
    """The twins of mode `hard` do not fit; the message carries the arithmetic, `missing` the bytes that are short."""

    def __init__(self, message: str, *, missing: int) -> None:
        self.missing = missing
        super().__init__(message)


def reason(error: Exception) -> str:
    """Why a file, which the message names already, could not be read or parsed."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON (line {error.lineno} column {error.colno}: {error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not UTF-8 (from byte {error.start})"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
