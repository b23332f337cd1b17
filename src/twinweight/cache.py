"""`Cache`: measured times kept between processes, one JSON file a shape, each saying what it was measured on.

A file holds for one device, one set of versions and one shape; its name is a hash of these, and its content repeats them. What
cannot be read, or says something else than its name, is ignored with a message.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from twinweight.errors import ConfigError
from twinweight.measured import Measured

log = logging.getLogger("twinweight")

VARIABLE = "TWINWEIGHT_CACHE"
"""A directory, or `off`. Unset: $XDG_CACHE_HOME/twinweight, ~/.cache/twinweight."""

_FORMAT = 5


def default(environ: Mapping[str, str] | None = None) -> Cache | None:
    """The cache that the environment names; None where it is turned off, or no directory is there for it.

    Raises ConfigError for a directory below the home of a user whom there is not.
    """
    environ = os.environ if environ is None else environ
    if given := environ.get(VARIABLE):
        try:
            return None if given.lower() == "off" else Cache(Path(given).expanduser())
        except RuntimeError as error:
            raise ConfigError(f"{VARIABLE} is {given!r}: {error}") from None
    base = environ.get("XDG_CACHE_HOME")
    # The XDG specification: a path that is not absolute counts as unset.
    if base and Path(base).is_absolute():
        return Cache(Path(base) / "twinweight")
    try:
        return Cache(Path.home() / ".cache" / "twinweight")
    except RuntimeError:  # a user without a home, as in containers
        log.warning("no home directory to keep measurements in: %s names one for them", VARIABLE)
        return None


@dataclass(frozen=True)
class Record:
    """One file: what was measured, on which device, with which versions."""

    shape: Mapping[str, Any]
    device: Mapping[str, Any]
    versions: Mapping[str, Any]
    measured: Measured


@dataclass(frozen=True)
class Cache:
    """Files in one directory, which is made when it is first written to."""

    directory: Path

    def is_empty(self) -> bool:
        """Whether nothing was ever kept there."""
        try:
            return next(self.directory.iterdir(), None) is None
        except OSError:
            return True

    def read(self, shape: Mapping[str, object], device: torch.device, **versions: str) -> Measured | None:
        """What was measured for a shape on this device with these versions; None where there is nothing."""
        key = _key(shape, device, versions)
        file = self._file(key)
        try:
            if not file.exists():
                return None
        except OSError as error:  # a directory on the way may not be searched
            log.warning("%s cannot be read: %s", file, error.strerror)
            return None
        record = _parse(file)
        if record is None:
            return None
        if {"shape": record.shape, "device": record.device, "versions": record.versions} != key:
            log.warning("%s holds measurements of something else and is ignored", file)
            return None
        return record.measured

    def write(self, shape: Mapping[str, object], device: torch.device, measured: Measured, **versions: str) -> None:
        """Keep a measurement. A reader finds all of a file or the one before; failing to write is a message."""
        key = _key(shape, device, versions)
        file = self._file(key)
        content = {"format": _FORMAT, **key, "measured": measured.to_json()}
        part = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.directory, suffix=".part", delete=False) as out:
                part = Path(out.name)
                json.dump(content, out)
            part.replace(file)
        except OSError as error:
            log.warning("measurements are not kept: cannot write %s: %s", file, error.strerror)
            if part is not None:
                part.unlink(missing_ok=True)

    def mark(self, **what: object) -> Path:
        """The file that says that something was done with these versions; whoever does it makes the file."""
        return self.directory / f"done-{_digest({**what, 'versions': _versions()})}"

    def records(self) -> Iterator[Record]:
        """Every measurement there is, of all devices and versions, the newest first."""
        try:
            files = [(f.stat().st_mtime, f) for f in self.directory.glob("*.json")] if self.directory.is_dir() else []
        except OSError as error:
            log.warning("%s cannot be read: %s", self.directory, error.strerror)
            return
        for _, file in sorted(files, key=lambda f: (-f[0], f[1])):
            if (record := _parse(file)) is not None:
                yield record

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self.directory / f"{key['shape']['n']}x{key['shape']['k']}-{_digest(key)}.json"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def _parse(file: Path) -> Record | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']}")
        shape, device, versions = (dict(found[name]) for name in ("shape", "device", "versions"))
        return Record(shape, device, versions, Measured.from_json(found["measured"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is no measurement of this version and is ignored (%s: %s)", file, type(error).__name__, error)
        return None


def _key(shape: Mapping[str, object], device: torch.device, versions: Mapping[str, str]) -> dict[str, Any]:
    # Through JSON, so that it compares equal to what is read back.
    key = {"shape": dict(shape), "device": describe(device), "versions": {**_versions(), **versions}}
    found: dict[str, Any] = json.loads(json.dumps(key))
    return found


def describe(device: torch.device) -> dict[str, object]:
    """What a device is to a measurement: kind, name and architecture; of a CPU its instruction sets and torch's threads too."""
    if device.type == "cpu":
        name, flags = _processor()
        return {"type": "cpu", "name": name, "flags": flags, "threads": torch.get_num_threads()}
    properties = torch.get_device_module(device.type).get_device_properties(device)
    arch = getattr(properties, "gcnArchName", None) or ".".join(str(getattr(properties, a, "")) for a in ("major", "minor"))
    return {"type": device.type, "name": properties.name, "arch": arch}


@functools.cache
def _processor() -> tuple[str, str]:
    """The name of the processor, and a hash of its flags."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = " ".join(sorted((fields.get("flags") or fields.get("Features") or "").split()))
    return name, hashlib.sha256(flags.encode()).hexdigest()[:12]


@functools.cache
def _versions() -> dict[str, str]:
    """What else the times depend on. Our own kernels count by their text, so that a change of them is measured."""
    found = {"torch": str(torch.__version__)}
    for name in ("twinweight", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(file.read_bytes())
    return {**found, "kernels": digest.hexdigest()[:12]}
