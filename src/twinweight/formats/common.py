"""What the formats share: checks of config values, headers, scales and group indices, and where a module is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError, UnsupportedError

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Int4Kind:
    """What a stored module will be once read. group_size: columns in a group (K per channel). act_order: it has a g_idx."""

    group_size: int
    symmetric: bool
    act_order: bool


def refuse(file: Path, key: str, expected: str, found: object) -> UnsupportedError:
    """The error for a config value outside what Twinweight runs."""
    return UnsupportedError(file=file, expected=f"{key}: {expected}", found=repr(found))


def integer(config: dict[str, Any], key: str, file: Path) -> int:
    """A whole number out of the config. Raises CheckpointError where it is missing or something else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(file=file, expected=f"{key}: a whole number", found=repr(value))
    return value


def boolean(config: dict[str, Any], key: str, default: bool, file: Path) -> bool:
    """A truth value out of the config; null counts as absent. Raises CheckpointError for anything else."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(file=file, expected=f"{key}: true or false", found=repr(value))
    return value


def table(config: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """An object out of the config; null counts as empty. Raises CheckpointError for anything else."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(file=file, expected=f"{key}: an object", found=repr(value))
    return value


def group_size(value: int, key: str, file: Path) -> int | None:
    """Columns in a group, None for per channel (stored as -1). Raises UnsupportedError for sizes we have no kernels for."""
    if value == -1:
        return None
    if value not in GROUP_SIZES:
        raise refuse(file, key, f"{', '.join(map(str, GROUP_SIZES))} or -1 (per channel)", value)
    return value


def pattern(text: str, key: str, file: Path) -> re.Pattern[str]:
    """A compiled regular expression. Raises CheckpointError where it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(file=file, expected=f"{key}: a regular expression", found=f"{text!r} ({error})") from error


def stored_quantized(ckpt: Checkpoint, name: str, marker: str, claim: bool | None, why: str) -> bool:
    """Whether module `name` is stored as 4-bit integers, that is, has a tensor `<name>.<marker>`.

    claim: what the config says, or None where it says nothing and the file decides. why: where it says so, for messages.
    Raises CheckpointError where config and file disagree, or where the module is stored twice or not at all.
    """
    quantized, dense = f"{name}.{marker}", f"{name}.weight"
    has_quantized, has_dense = quantized in ckpt, dense in ckpt
    if not (has_quantized or has_dense) and _is_tied_head(ckpt, name):
        return False
    if has_quantized and has_dense:
        raise _mismatch(ckpt, dense, f"{quantized} or {dense}", "both")
    if claim is None and not has_quantized and not has_dense:
        raise _mismatch(ckpt, quantized, f"{quantized} or {dense}", "neither")
    if claim and not has_quantized:
        raise _mismatch(ckpt, dense if has_dense else quantized, f"{quantized} ({why})", dense if has_dense else "none")
    if claim is False and has_quantized:
        raise _mismatch(ckpt, quantized, f"{dense} ({why})", quantized)
    return has_quantized


def _mismatch(ckpt: Checkpoint, tensor: str, expected: str, found: str) -> CheckpointError:
    file = ckpt.info(tensor).file if tensor in ckpt else ckpt.source
    return CheckpointError(file=file, tensor=tensor, expected=expected, found=found)


def _is_tied_head(ckpt: Checkpoint, name: str) -> bool:
    text = ckpt.config.get("text_config")
    tied = ckpt.config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return bool(tied) and is_head(name)


def is_head(name: str) -> bool:
    """Whether a module of this name is a model's output head."""
    return name.rpartition(".")[2] == "lm_head"


def expect(ckpt: Checkpoint, tensor: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the file has the tensor with one of these dtypes and this shape (headers only)."""
    info = ckpt.info(tensor)
    if info.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(file=info.file, tensor=tensor, expected=f"dtype {names}", found=found)
    if info.shape != shape:
        raise CheckpointError(file=info.file, tensor=tensor, expected=f"shape {list(shape)}", found=str(list(info.shape)))


def matrix(ckpt: Checkpoint, tensor: str) -> tuple[int, int]:
    """The shape of a stored matrix. Raises CheckpointError for anything but two sizes from 1 up."""
    info = ckpt.info(tensor)
    if len(info.shape) != 2 or min(info.shape) < 1:
        found = str(list(info.shape))
        raise CheckpointError(file=info.file, tensor=tensor, expected="a matrix of two sizes from 1 up", found=found)
    return info.shape[0], info.shape[1]


def group_columns(ckpt: Checkpoint, tensor: str, size: int | None, k: int) -> int:
    """Columns in a group of a weight with K = `k`: K itself per channel. Raises UnsupportedError unless it divides K."""
    if size is None:
        return k
    if k % size:
        file = ckpt.info(tensor).file
        raise UnsupportedError(file=file, tensor=tensor, expected=f"K a multiple of the group size {size}", found=f"K = {k}")
    return size


def read_scales(ckpt: Checkpoint, tensor: str, dtype: torch.dtype | None, *, transpose: bool = False) -> Tensor:
    """Scales [N, G] of their own, rounded once to `dtype` (None: as stored); `transpose` where the file has [G, N].

    Raises CheckpointError for NaN or infinite scales, UnsupportedError where `dtype` cannot hold them.
    """
    stored = ckpt.read(tensor)
    file = ckpt.info(tensor).file
    bad = int((~torch.isfinite(stored)).sum())
    if bad:
        raise CheckpointError(file=file, tensor=tensor, expected="finite scales", found=f"{bad} that are NaN or infinite")
    scales = torch.empty(stored.shape[::-1] if transpose else stored.shape, dtype=dtype or stored.dtype)
    scales.copy_(stored.T if transpose else stored)
    if not bool(torch.isfinite(scales).all()):
        found = f"up to {float(stored.abs().max()):g} in {stored.dtype}"
        raise UnsupportedError(file=file, tensor=tensor, expected=f"scales that fit {scales.dtype}", found=found)
    return scales


def read_group_index(ckpt: Checkpoint, tensor: str, columns: int) -> Tensor | None:
    """The group of each column, int32 [K], or None where it says no more than `k // columns` (or nothing: all -1).

    columns: columns in a group. Raises CheckpointError for a group out of range or not of exactly that many columns.
    """
    stored = ckpt.read(tensor)
    if bool((stored == -1).all()):  # compressed-tensors: not set, columns are in order
        return None
    k = stored.numel()
    groups = k // columns
    index = stored.long()
    file = ckpt.info(tensor).file
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise CheckpointError(file=file, tensor=tensor, expected=f"groups 0..{groups - 1}", found=f"{low}..{high}")
    if torch.equal(index, torch.arange(k) // columns):
        return None
    wrong = torch.bincount(index, minlength=groups) != columns
    if bool(wrong.any()):
        group = int(wrong.nonzero()[0])
        found = f"{int((index == group).sum())} in group {group}"
        raise CheckpointError(file=file, tensor=tensor, expected=f"{columns} columns in each group", found=found)
    return stored.to(torch.int32, copy=True)
