"""AWQ, 4 bits, gemm order: what AutoAWQ writes.

A module `x` is `x.qweight` int32 [K, N/8], `x.qzeros` int32 [G, N/8] and `x.scales` [G, N]. Nibble i (low bits first) of
word c holds output feature 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. Source: AutoAWQ `modules/linear/gemm.py`,
`utils/packing_utils.py`; without `zero_point` values are offset by 8 (compressed_tensors 0.20 `AutoAWQConverter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError
from twinweight.formats import common
from twinweight.weight import SYMMETRIC_ZERO, Int4Weight

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_CHUNK = 1 << 20
"""Bytes of qweight repacked at a time: a few times that is all the extra memory, and it stays in the cache."""


@dataclass(frozen=True)
class Scheme:
    """The `quantization_config` of an AWQ checkpoint. group_size: None per channel. dense: modules_to_not_convert."""

    group_size: int | None
    zero_point: bool
    dense: tuple[str, ...]
    lm_head: bool | None

    def leaves_dense(self, name: str) -> bool:
        """Whether `modules_to_not_convert` names the module: an entry is one of its dotted parts, or several in a row.

        AutoAWQ matches any substring, by which `gate` also means `gate_proj`; there the file decides.
        """
        return any(f".{entry.strip('.')}." in f".{name}." for entry in self.dense)


def parse(config: dict[str, Any], file: Path) -> Scheme:
    """The scheme out of a `quantization_config`. Raises UnsupportedError for whatever is not 4-bit AWQ in gemm order."""
    bits, size = ("bits", "group_size") if "bits" in config else ("w_bit", "q_group_size")
    if common.integer(config, bits, file) != 4:
        raise common.refuse(file, bits, "4", config[bits])
    version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise common.refuse(file, "version", "gemm", version)
    if config.get("backend") == "llm-awq":
        raise common.refuse(file, "backend", "autoawq", "llm-awq")
    dense = config.get("modules_to_not_convert") or []
    if not isinstance(dense, list) or not all(isinstance(entry, str) and entry for entry in dense):
        raise CheckpointError(file=file, expected="modules_to_not_convert: a list of names", found=repr(dense))
    return Scheme(
        group_size=common.group_size(common.integer(config, size, file), size, file),
        zero_point=common.boolean(config, "zero_point", True, file),
        dense=tuple(dense),
        lm_head=common.boolean(config, "lm_head", False, file) if config.get("lm_head") is not None else None,
    )


def is_quantized(scheme: Scheme, name: str, ckpt: Checkpoint) -> bool:
    """Whether the linear module `name` is stored as int4.

    An AWQ config does not list its modules (projectors and audio towers are dense without a word), so the file decides,
    unless `modules_to_not_convert` or `lm_head` says otherwise. Raises CheckpointError where they disagree.
    """
    claim: bool | None = None
    why = ""
    if scheme.leaves_dense(name):
        claim, why = False, "in modules_to_not_convert"
    elif common.is_head(name) and scheme.lm_head is not None:
        claim, why = scheme.lm_head, f"lm_head: {scheme.lm_head}"
    return common.stored_quantized(ckpt, name, "qweight", claim, why)


def check(scheme: Scheme, name: str, ckpt: Checkpoint, shape: tuple[int, int]) -> common.Int4Kind:
    """Check module `name` for a weight of shape (N, K). Raises CheckpointError or UnsupportedError."""
    n, k = shape
    columns = common.group_columns(ckpt, f"{name}.qweight", scheme.group_size, k)
    groups = k // columns
    common.expect(ckpt, f"{name}.scales", common.SCALE_DTYPES, (groups, n))
    if n % 8:
        file = ckpt.info(f"{name}.qweight").file
        raise CheckpointError(file=file, tensor=f"{name}.qweight", expected="N a multiple of 8", found=f"N = {n}")
    common.expect(ckpt, f"{name}.qweight", (torch.int32,), (k, n // 8))
    if scheme.zero_point or f"{name}.qzeros" in ckpt:
        common.expect(ckpt, f"{name}.qzeros", (torch.int32,), (groups, n // 8))
    return common.Int4Kind(columns, symmetric=not scheme.zero_point, act_order=False)


def shape(scheme: Scheme, name: str, ckpt: Checkpoint) -> tuple[int, int]:
    """(N, K) of a quantized module."""
    k, words = common.matrix(ckpt, f"{name}.qweight")
    return 8 * words, k


def read(scheme: Scheme, name: str, ckpt: Checkpoint, dtype: torch.dtype) -> Int4Weight:
    """Module `name`, checked; scales in `dtype` (bf16 or fp16).

    Raises what `check` raises, and CheckpointError for scales that are not finite, or zero points other than 8 in a
    checkpoint without zero points.
    """
    n, k = shape(scheme, name, ckpt)
    columns = check(scheme, name, ckpt, (n, k)).group_size
    return Int4Weight(
        packed=repack(ckpt.read(f"{name}.qweight")),
        scales=common.read_scales(ckpt, f"{name}.scales", dtype, transpose=True),
        zeros=_zeros(scheme, f"{name}.qzeros", ckpt),
        g_idx=None,
        group_size=columns,
        in_features=k,
    )


def owned_tensors(name: str, ckpt: Checkpoint) -> list[str]:
    """The file's tensors that `read` covers, without the bias."""
    return [t for suffix in ("qweight", "qzeros", "scales") if (t := f"{name}.{suffix}") in ckpt]


def repack(qweight: Tensor) -> Tensor:
    """int32 [K, N/8] in AWQ order -> int32 [N, ceil(K/8)] in ours, a band of output features at a time."""
    k, words = qweight.shape
    packed = torch.zeros(8 * words, -(-k // 8), dtype=torch.int32)
    octets = packed.view(torch.uint8).view(words, 8, -1)  # two columns k in a byte
    pairs = -(-k // 2)
    band = max(1, _CHUNK // (4 * k))
    for start in range(0, words, band):
        part = qweight[:, start : start + band].T.contiguous()
        if k % 2:
            part = torch.nn.functional.pad(part, (0, 1))
        source = part.view(torch.uint8).view(part.shape[0], pairs, 2, 4)
        even, odd = source[:, :, 0], source[:, :, 1]
        low, high = (even & 15) | (odd << 4), (even >> 4) | (odd & 240)
        for byte in range(4):
            octets[start : start + band, _ORDER[2 * byte], :pairs] = low[:, :, byte]
            octets[start : start + band, _ORDER[2 * byte + 1], :pairs] = high[:, :, byte]
    return packed


def _zeros(scheme: Scheme, tensor: str, ckpt: Checkpoint) -> Tensor | None:
    """Zero points uint8 [N, G], or None for a symmetric module."""
    if tensor not in ckpt:  # `check` saw that it is symmetric
        return None
    zeros = _unpack(ckpt.read(tensor)).T.contiguous()
    if scheme.zero_point:
        return zeros
    low, high = int(zeros.min()), int(zeros.max())
    if (low, high) != (SYMMETRIC_ZERO, SYMMETRIC_ZERO):
        expected = f"zero points all {SYMMETRIC_ZERO} (zero_point: false)"
        raise CheckpointError(file=ckpt.info(tensor).file, tensor=tensor, expected=expected, found=f"{low}..{high}")
    return None


def _unpack(words: Tensor) -> Tensor:
    """int32 [G, N/8] in AWQ order -> uint8 [G, N]."""
    values = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for nibble, column in enumerate(_ORDER):
        values[:, :, column] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return values.flatten(1)
