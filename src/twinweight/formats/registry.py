"""Which format a checkpoint has: `detect` finds it and binds its functions.

A format is one module with pure functions over a frozen scheme (`Reader`); a new one is a file and a line in `_READERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from twinweight.checkpoint import Checkpoint, read_json
from twinweight.errors import CheckpointError, UnsupportedError
from twinweight.formats import awq, compressed_tensors, gptq
from twinweight.formats.common import Int4Kind
from twinweight.weight import Int4Weight


class Reader(Protocol):
    """What a format's module provides; `scheme` is what its own `parse` gave."""

    def parse(self, config: dict[str, Any], file: Path) -> Any: ...
    def is_quantized(self, scheme: Any, name: str, ckpt: Checkpoint) -> bool: ...
    def check(self, scheme: Any, name: str, ckpt: Checkpoint, shape: tuple[int, int]) -> Int4Kind: ...
    def shape(self, scheme: Any, name: str, ckpt: Checkpoint) -> tuple[int, int]: ...
    def read(self, scheme: Any, name: str, ckpt: Checkpoint, dtype: torch.dtype) -> Int4Weight: ...
    def owned_tensors(self, name: str, ckpt: Checkpoint) -> list[str]: ...


_READERS: dict[str, Reader] = {
    "compressed-tensors": cast(Reader, compressed_tensors),
    "gptq": cast(Reader, gptq),
    "awq": cast(Reader, awq),
}


@dataclass(frozen=True, eq=False)
class Format:
    """A checkpoint with the functions of its format. Module names are the checkpoint's, such as `model.layers.0.mlp.up_proj`.

    name: "compressed-tensors", "gptq" or "awq". scheme: the parsed quantization config.
    """

    name: str
    scheme: Any
    ckpt: Checkpoint
    reader: Reader

    def is_quantized(self, name: str) -> bool:
        """Whether linear module `name` is stored as int4. Raises CheckpointError where config and file disagree."""
        return self.reader.is_quantized(self.scheme, name, self.ckpt)

    def check(self, name: str, shape: tuple[int, int]) -> Int4Kind:
        """Check a quantized module against (N, K), and say what `read` will give.

        Reads headers, and the g_idx of act-order modules (K numbers). Raises CheckpointError, UnsupportedError.
        """
        return self.reader.check(self.scheme, name, self.ckpt, shape)

    def describe(self, name: str) -> Int4Kind:
        """`check` against the checkpoint's own shape."""
        return self.check(name, self.shape(name))

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a quantized module, as the checkpoint says."""
        return self.reader.shape(self.scheme, name, self.ckpt)

    def read(self, name: str, dtype: torch.dtype) -> Int4Weight:
        """A quantized module, its scales in `dtype`. `packed` may be a view of the file's pages: copy it to keep it.

        Raises what `check` raises, and CheckpointError for values that cannot be (NaN scales, groups out of range).
        """
        return self.reader.read(self.scheme, name, self.ckpt, dtype)

    def owned_tensors(self, name: str) -> list[str]:
        """The checkpoint tensors of a quantized module, without its bias (`<name>.bias`)."""
        return self.reader.owned_tensors(name, self.ckpt)


def detect(ckpt: Checkpoint) -> Format:
    """The format of a checkpoint, from its quantization config.

    That is `quantization_config` in config.json (or in its `text_config`), or quantize_config.json (old GPTQ) or
    quant_config.json (old AWQ). Raises UnsupportedError for a dense checkpoint and for formats we do not run.
    """
    config, file = _quantization_config(ckpt)
    method = config.get("quant_method") or config.get("method")
    if method is None:
        method = {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(file.name)
    reader = _READERS.get(str(method).lower())
    if reader is None:
        raise UnsupportedError(file=file, expected=f"quant_method: one of {', '.join(_READERS)}", found=repr(method))
    return Format(str(method).lower(), reader.parse(config, file), ckpt, reader)


def _quantization_config(ckpt: Checkpoint) -> tuple[dict[str, Any], Path]:
    file = ckpt.path / "config.json"
    for place in (ckpt.config, ckpt.config.get("text_config")):
        for key in ("quantization_config", "compression_config"):  # the second: compressed-tensors before 0.5
            if isinstance(place, dict) and place.get(key) is not None:
                if not isinstance(place[key], dict):
                    raise CheckpointError(file=file, expected=f"{key}: an object", found=repr(place[key]))
                return place[key], file
    for name in ("quantize_config.json", "quant_config.json"):
        if (ckpt.path / name).exists():
            return read_json(ckpt.path / name), ckpt.path / name
    raise UnsupportedError(file=file, expected="a quantization_config (a W4A16 checkpoint)", found="none: a dense one")
