"""One safetensors file: its header read and checked, and single tensors mapped in and out of memory.

Why not `safetensors.safe_open`: it parses the whole header at every open and maps the whole file for as long as any of
its tensors lives. Here each tensor has a mapping of its own, which goes, pages and all, with the tensor.
Layout: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.errors import CheckpointError, UnsupportedError, reason

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

_MAP_FROM = 1 << 16
"""Bytes from which a tensor is mapped: below, one read is cheaper, and a process may hold only 65,530 mappings."""

_COPY_BYTES = 16 << 20
"""Most bytes of a file that are mapped at once while a tensor is copied."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, torch dtype, shape, and the absolute byte offset and size of its data in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, from its header alone.

    Raises CheckpointError for a truncated file, bad JSON, a name that comes twice, offsets that do not fit the shapes or
    leave holes; UnsupportedError for an unknown dtype.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise CheckpointError(file=file, expected="a safetensors file of 8 bytes or more", found=f"{size} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, _MAX_HEADER):
            if length > _MAX_HEADER or f.read(1) not in (b"{", b""):
                raise CheckpointError(file=file, expected="a safetensors header", found="not a safetensors file")
            raise CheckpointError(file=file, expected=f"a header of {length} bytes", found=f"a file of {size} bytes")
        raw = f.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file=file, expected="a JSON header", found=reason(error)) from error
    if not isinstance(header, dict):
        raise CheckpointError(file=file, expected="a JSON object as header", found=type(header).__name__)
    start = 8 + length
    infos = {name: _tensor_info(file, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"}
    _check_contiguous(infos, file, start, size)
    return infos


def read_tensor(info: TensorInfo, name: str) -> Tensor:
    """The data of one tensor; writing to it does not change the file.

    From 64 KiB on it is a view of a private mapping of just its own pages, which is unmapped when the last view dies.
    Raises CheckpointError where the file became shorter since its header was read.
    """
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    skip = 0
    buffer: Any
    with info.file.open("rb") as f:
        if info.nbytes < _MAP_FROM:
            f.seek(info.offset)
            buffer = bytearray(f.read(info.nbytes))
        else:
            skip = info.offset % mmap.ALLOCATIONGRANULARITY
            try:
                # copy-on-write: torch warns about buffers that cannot be written
                buffer = mmap.mmap(f.fileno(), skip + info.nbytes, access=mmap.ACCESS_COPY, offset=info.offset - skip)
            except ValueError:  # longer than the file
                buffer = b""
            if buffer and hasattr(mmap, "MADV_WILLNEED"):
                buffer.madvise(mmap.MADV_WILLNEED)
    if len(buffer) != skip + info.nbytes:
        found = f"a file of {info.file.stat().st_size} bytes"
        raise CheckpointError(file=info.file, tensor=name, expected=f"data up to byte {info.offset + info.nbytes}", found=found)
    octets = torch.frombuffer(buffer, dtype=torch.uint8, offset=skip, count=info.nbytes)
    if skip % info.dtype.itemsize:
        octets = octets.clone()  # the format does not promise aligned data
    return octets.view(info.dtype).reshape(info.shape)


def copy_tensor(info: TensorInfo, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor's data in new memory; the file's pages are mapped some rows at a time, so that they never add up.

    Raises what `read_tensor` raises.
    """
    out = torch.empty(info.shape, dtype=dtype, device=device)
    if len(info.shape) == 0 or info.nbytes <= _COPY_BYTES:
        out.copy_(read_tensor(info, name))
        return out
    row = info.nbytes // info.shape[0]
    step = max(1, _COPY_BYTES // row)
    for at in range(0, info.shape[0], step):
        rows = min(step, info.shape[0] - at)
        part = replace(info, shape=(rows, *info.shape[1:]), offset=info.offset + at * row, nbytes=rows * row)
        out[at : at + rows] = read_tensor(part, name)
    return out


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(file=file, tensor=twice, expected="every name once", found="the name twice in the header")
    return entries


def _tensor_info(file: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    try:
        code, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(number) is not int for number in (*shape, begin, end)):
            raise ValueError("not a whole number")
    except (KeyError, TypeError, ValueError) as error:
        expected = "dtype, shape and data_offsets in the header"
        raise CheckpointError(file=file, tensor=name, expected=expected, found=repr(entry)) from error
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise UnsupportedError(file=file, tensor=name, expected=f"a dtype of {', '.join(_DTYPES)}", found=code)
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or min(shape, default=0) < 0 or end - begin != nbytes:
        found = f"data_offsets [{begin}, {end}]"
        raise CheckpointError(file=file, tensor=name, expected=f"{nbytes} bytes for {code} {list(shape)}", found=found)
    if start + end > size:
        raise CheckpointError(
            file=file, tensor=name, expected=f"data up to byte {start + end}", found=f"a truncated file of {size} bytes"
        )
    return TensorInfo(file, dtype, shape, start + begin, nbytes)


def _check_contiguous(infos: dict[str, TensorInfo], file: Path, start: int, size: int) -> None:
    """The format forbids holes and overlaps: either means that header and data do not belong together."""
    at = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            expected, found = f"data from byte {at} (no hole, no overlap)", f"byte {info.offset}"
            raise CheckpointError(file=file, tensor=name, expected=expected, found=found)
        at += info.nbytes
    if at != size:
        raise CheckpointError(file=file, expected=f"{at} bytes, as the header says", found=f"{size} bytes")
