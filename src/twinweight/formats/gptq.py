"""GPTQ, 4 bits: what AutoGPTQ and GPTQModel write.

A module `x` is `x.qweight` int32 [ceil(K/8), N] (eight columns k in a word, low bits first), `x.qzeros` int32
[G, ceil(N/8)] packed along N (a symmetric one may lack it), `x.scales` [G, N], and mostly `x.g_idx` [K].
`checkpoint_format`: `gptq` (v1) stores zero points minus 1, `gptq_v2` stores them as they are. Source: GPTQModel
`nn_modules/qlinear/__init__.py`, `utils/model.py` (`convert_gptq_v1_to_v2_format`), `quantization/config.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError
from twinweight.formats import common
from twinweight.weight import SYMMETRIC_ZERO, Int4Weight, unpack_nibbles

_ONES = 0x11111111
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Params:
    """What may differ between modules. group_size: None per channel."""

    group_size: int | None
    symmetric: bool
    act_order: bool


@dataclass(frozen=True)
class Rule:
    """One entry of GPTQModel's `dynamic`: the modules it matches (from the start); params None: they stay dense."""

    pattern: re.Pattern[str]
    params: Params | None


@dataclass(frozen=True)
class Scheme:
    """The `quantization_config` (or quantize_config.json) of a GPTQ checkpoint.

    v2: zero points are stored as they are. words_wrap: the writer took 1 off whole words, so a zero point 0 borrowed from
    its neighbour. lm_head: whether the head is quantized, None where the config does not say.
    """

    params: Params
    rules: tuple[Rule, ...]
    v2: bool
    words_wrap: bool
    lm_head: bool | None

    def module(self, name: str) -> Params | None:
        """The parameters of a module by the first rule that matches; None where a rule leaves it dense."""
        return next((rule.params for rule in self.rules if rule.pattern.match(name)), self.params)


def parse(config: dict[str, Any], file: Path) -> Scheme:
    """The scheme out of a `quantization_config`. Raises UnsupportedError for whatever is not plain 4-bit GPTQ."""
    if common.integer(config, "bits", file) != 4:
        raise common.refuse(file, "bits", "4", config["bits"])
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        stored = "marlin"
    if stored not in ("gptq", "gptq_v2"):
        raise common.refuse(file, "checkpoint_format", "gptq or gptq_v2", stored)
    if config.get("pack_dtype") not in (None, "int32"):
        raise common.refuse(file, "pack_dtype", "int32", config["pack_dtype"])
    for key in ("adapter", "rotation"):
        if config.get(key):
            raise common.refuse(file, key, "none", config[key])
    params = Params(
        group_size=common.group_size(common.integer(config, "group_size", file), "group_size", file),
        symmetric=common.boolean(config, "sym", True, file),
        act_order=common.boolean(config, "desc_act", False, file),
    )
    rules = tuple(_rule(text, override, params, file) for text, override in common.table(config, "dynamic", file).items())
    quantizer = str(common.table(config, "meta", file).get("quantizer", "")).lower()
    lm_head = None if config.get("lm_head") is None else common.boolean(config, "lm_head", False, file)
    return Scheme(params, rules, stored == "gptq_v2", "gptqmodel" in quantizer, lm_head)


def is_quantized(scheme: Scheme, name: str, ckpt: Checkpoint) -> bool:
    """Whether the linear module `name` is stored as int4.

    A GPTQ config does not list its modules (vision towers and routers are dense without a word), so the file decides,
    unless a negative `dynamic` rule or `lm_head` says otherwise. Raises CheckpointError where they disagree.
    """
    claim: bool | None = None
    why = ""
    if scheme.module(name) is None:
        claim, why = False, "a negative rule of dynamic"
    elif common.is_head(name) and scheme.lm_head is not None:
        claim, why = scheme.lm_head, f"lm_head: {scheme.lm_head}"
    return common.stored_quantized(ckpt, name, "qweight", claim, why)


def check(scheme: Scheme, name: str, ckpt: Checkpoint, shape: tuple[int, int]) -> common.Int4Kind:
    """Check module `name` for a weight of shape (N, K). Raises CheckpointError or UnsupportedError."""
    n, k = shape
    params = _params_of(scheme, name, ckpt)
    columns = common.group_columns(ckpt, f"{name}.qweight", params.group_size, k)
    groups = k // columns
    common.expect(ckpt, f"{name}.qweight", (torch.int32,), (-(-k // 8), n))
    if not params.symmetric or f"{name}.qzeros" in ckpt:
        common.expect(ckpt, f"{name}.qzeros", (torch.int32,), (groups, -(-n // 8)))
    common.expect(ckpt, f"{name}.scales", common.SCALE_DTYPES, (groups, n))
    if f"{name}.g_idx" in ckpt or (params.act_order and groups > 1):
        common.expect(ckpt, f"{name}.g_idx", _INTEGERS, (k,))
    return common.Int4Kind(columns, params.symmetric, _g_idx(params, f"{name}.g_idx", ckpt, columns) is not None)


def shape(scheme: Scheme, name: str, ckpt: Checkpoint) -> tuple[int, int]:
    """(N, K) of a quantized module; without a g_idx, K is taken for a multiple of 8."""
    words, n = common.matrix(ckpt, f"{name}.qweight")
    order = ckpt.tensors.get(f"{name}.g_idx")
    return n, order.shape[0] if order is not None and order.shape else 8 * words


def read(scheme: Scheme, name: str, ckpt: Checkpoint, dtype: torch.dtype) -> Int4Weight:
    """Module `name`, checked; scales in `dtype` (bf16 or fp16).

    Raises what `check` raises, and CheckpointError for scales that are not finite, a g_idx out of range, zero points that
    a symmetric checkpoint cannot have, or v1 zero points that cannot be told.
    """
    n, k = shape(scheme, name, ckpt)
    columns = check(scheme, name, ckpt, (n, k)).group_size
    params = _params_of(scheme, name, ckpt)
    return Int4Weight(
        packed=ckpt.read(f"{name}.qweight").T.contiguous(),  # the words hold the same columns as ours
        scales=common.read_scales(ckpt, f"{name}.scales", dtype, transpose=True),
        zeros=_zeros(scheme, params, f"{name}.qzeros", ckpt, n),
        g_idx=_g_idx(params, f"{name}.g_idx", ckpt, columns),
        group_size=columns,
        in_features=k,
    )


def owned_tensors(name: str, ckpt: Checkpoint) -> list[str]:
    """The file's tensors that `read` covers, without the bias."""
    return [t for suffix in ("qweight", "qzeros", "scales", "g_idx") if (t := f"{name}.{suffix}") in ckpt]


def _zeros(scheme: Scheme, params: Params, tensor: str, ckpt: Checkpoint, n: int) -> Tensor | None:
    """Zero points uint8 [N, G], or None for a symmetric module."""
    if tensor not in ckpt:  # `check` saw that it is symmetric
        return None
    words = ckpt.read(tensor)
    stored = unpack_nibbles(words)[:, :n]
    file = ckpt.info(tensor).file
    if params.symmetric:
        # Writers mislabel v1 and v2 (vLLM PR 38966: a `gptq` checkpoint of 8s); `sym` and one value leave no doubt.
        low, high = int(stored.min()), int(stored.max())
        if low != high or low not in (SYMMETRIC_ZERO - 1, SYMMETRIC_ZERO):
            expected = "stored zero points all 7 or all 8 (sym: true)"
            raise CheckpointError(file=file, tensor=tensor, expected=expected, found=f"{low}..{high}")
        return None
    if not scheme.v2:
        if scheme.words_wrap:
            stored = unpack_nibbles(words + _ONES)[:, :n]  # undoes the borrows too
        elif bool((stored == 15).any()):
            # AutoGPTQ packs a zero point 0 as -1, which overwrites its neighbours: nothing can read that back
            expected = "zero points 1..15 (v1 by another writer than GPTQModel has no 0)"
            raise CheckpointError(file=file, tensor=tensor, expected=expected, found="a stored 15")
        else:
            stored = stored + 1
    return stored.T.contiguous()


def _g_idx(params: Params, tensor: str, ckpt: Checkpoint, columns: int) -> Tensor | None:
    """The g_idx, or None where it is absent or in order. One out of order under `desc_act: false` is refused: vLLM's fast
    kernels would ignore it, GPTQModel's torch kernel would not."""
    index = common.read_group_index(ckpt, tensor, columns) if tensor in ckpt else None
    if index is not None and not params.act_order:
        file = ckpt.info(tensor).file
        expected = f"groups in order, k // {columns} (desc_act: false)"
        raise CheckpointError(file=file, tensor=tensor, expected=expected, found="another order")
    return index


def _params_of(scheme: Scheme, name: str, ckpt: Checkpoint) -> Params:
    params = scheme.module(name)
    if params is None:
        expected = "a module that no negative rule of dynamic names"
        raise CheckpointError(file=ckpt.source, tensor=f"{name}.qweight", expected=expected, found=name)
    return params


def _rule(text: str, override: Any, params: Params, file: Path) -> Rule:
    key = f"dynamic[{text!r}]"
    if text.startswith("-:"):
        return Rule(common.pattern(text[2:], key, file), None)
    if not isinstance(override, dict):
        raise CheckpointError(file=file, expected=f"{key}: an object", found=repr(override))
    if override.get("bits", 4) != 4:
        raise common.refuse(file, f"{key}.bits", "4", override["bits"])
    for other in ("method", "quant_method", "format", "checkpoint_format", "pack_dtype", "adapter", "rotation"):
        if override.get(other):
            raise common.refuse(file, f"{key}.{other}", "none", override[other])
    size = params.group_size
    if "group_size" in override:
        size = common.group_size(common.integer(override, "group_size", file), f"{key}.group_size", file)
    return Rule(
        common.pattern(text.removeprefix("+:"), key, file),
        replace(
            params,
            group_size=size,
            symmetric=common.boolean(override, "sym", params.symmetric, file),
            act_order=common.boolean(override, "desc_act", params.act_order, file),
        ),
    )
