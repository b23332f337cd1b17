"""`Checkpoint`: a read-only view of a local model directory, checked from its headers when it is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from twinweight.errors import CheckpointError, UnsupportedError, reason
from twinweight.safetensors_file import TensorInfo, copy_tensor, read_header, read_tensor

__all__ = ["Checkpoint", "TensorInfo", "read_json"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory: its config and the tensors of its safetensors files. Holds no open file and no data.

    path: the directory. config: config.json as it is. source: the file that lists the tensors (the index, or the only
    file), else the directory; errors about a missing tensor name it. tensors: where each tensor lies.
    """

    path: Path
    config: dict[str, Any]
    source: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read config.json and every header; no tensor data.

        Raises CheckpointError for a missing directory, config.json, shard or indexed tensor, damaged JSON, truncated
        files and names found twice; UnsupportedError for a directory with pickled weights only.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise CheckpointError(file=directory, expected="a local model directory", found="none")
        config = read_json(directory / "config.json")
        index = _find_index(directory)
        weight_map = _read_index(index) if index else {}
        files = [directory / f for f in sorted(set(weight_map.values()))] if index else _weight_files(directory)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(file=file, expected="the shard that the index names", found="no such file")
            for name, info in read_header(file).items():
                if name in tensors:
                    found = f"it in {tensors[name].file.name} too"
                    raise CheckpointError(file=file, tensor=name, expected="every name in one file", found=found)
                tensors[name] = info
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                expected = f"it in {shard}, as the index says"
                found = f"it in {tensors[name].file.name}" if name in tensors else "no such tensor"
                raise CheckpointError(file=directory / shard, tensor=name, expected=expected, found=found)
        source = index or (files[0] if len(files) == 1 else directory)
        return cls(directory, config, source, MappingProxyType(tensors))

    def names(self) -> list[str]:
        """All tensor names, file by file."""
        return list(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """File, dtype, shape and size of a tensor, without reading it. Raises CheckpointError where there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(file=self.source, tensor=name, expected="a tensor of that name", found="none") from None

    def read(self, name: str) -> Tensor:
        """A tensor's data, memory-mapped: no copy, and its pages leave memory when the last view of it dies.

        Copy (or move) what is to live long: the file must not change under a view. Writing to it leaves the file alone.
        """
        return read_tensor(self.info(name), name)

    def copy(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor's data in new memory, on a device and in a dtype; peaks at its own size and 16 MiB."""
        return copy_tensor(self.info(name), name, device, dtype)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is missing or something else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(file=file, expected=f"{file.name} in the model directory", found="none") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(file=file, expected="a JSON object", found=reason(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(file=file, expected="a JSON object", found=type(content).__name__)
    return content


def _find_index(directory: Path) -> Path | None:
    if (directory / _INDEX).exists():
        return directory / _INDEX
    if (directory / _SINGLE).exists():
        return None
    others = sorted(directory.glob("*.safetensors.index.json"))  # old GPTQ: gptq_model-4bit-128g.safetensors.index.json
    if len(others) > 1:
        raise CheckpointError(file=directory, expected="one index file", found=", ".join(f.name for f in others))
    return others[0] if others else None


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(file=index, expected="a weight_map of tensor names to files", found=repr(weight_map))
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(file=index, tensor=name, expected="a file name without a path", found=repr(file))
    return weight_map


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(f.name for pattern in _PICKLES for f in directory.glob(pattern))
        kind = UnsupportedError if pickles else CheckpointError
        raise kind(file=directory, expected="*.safetensors files", found=", ".join(pickles) or "no weight files")
    for file in files:  # without an index only the names tell that a shard is missing
        if shard := _SHARD.fullmatch(file.name):
            have = len(list(directory.glob(f"{shard['stem']}-*-of-{shard['total']}.safetensors")))
            if have != int(shard["total"]):
                raise CheckpointError(file=file, expected=f"{int(shard['total'])} shards", found=str(have))
    return files
