"""compressed-tensors `pack-quantized`, 4-bit integers: what llm-compressor writes.

A module `x` is `x.weight_packed` int32 [N, ceil(K/8)] (eight columns in a word, low bits first, value + 8),
`x.weight_scale` [N, G], `x.weight_shape` = (N, K); asymmetric: `x.weight_zero_point` int32 [ceil(N/8), G], packed along N;
`actorder: group`: `x.weight_g_idx` [K]. Our canonical packing is this one, so the packed words are not copied.
Source: compressed_tensors 0.20 `compressors/pack_quantized`, `utils/match.py`; `weight_g_idx` from 0.9 to 0.19.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError
from twinweight.formats import common
from twinweight.weight import Int4Weight, unpack_nibbles

_PACKED, _SCALE, _SHAPE, _ZERO, _ORDER = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"
_INTEGERS = (torch.int64, torch.int32)
_PRESETS: dict[str, dict[str, Any]] = {
    name: {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": symmetric}
    for name, symmetric in (("W4A16", True), ("W4A16_ASYM", False))
}


@dataclass(frozen=True)
class Names:
    """A list of module names, `re:` patterns (matched from the start) and class names, as in `targets` and `ignore`."""

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def rank(self, name: str) -> int | None:
        """How closely the list names a linear module: 0 by name, 1 by pattern, 2 by class, None not at all."""
        if name in self.exact:
            return 0
        if any(p.match(name) for p in self.patterns):
            return 1
        return 2 if "Linear" in self.exact else None


@dataclass(frozen=True)
class Group:
    """One of the config groups. group_size: None per channel. act_order: the file has a g_idx."""

    targets: Names
    group_size: int | None
    symmetric: bool
    act_order: bool


@dataclass(frozen=True)
class Scheme:
    """The `quantization_config` of a compressed-tensors checkpoint."""

    groups: tuple[Group, ...]
    ignore: Names

    def group(self, name: str) -> Group | None:
        """The config group of a linear module: the closest match, the first among equals; None where it stays dense."""
        if self.ignore.rank(name) is not None:
            return None
        ranked = [(rank, i) for i, g in enumerate(self.groups) if (rank := g.targets.rank(name)) is not None]
        return self.groups[min(ranked)[1]] if ranked else None


def parse(config: dict[str, Any], file: Path) -> Scheme:
    """The scheme out of a `quantization_config`. Raises UnsupportedError for whatever is not 4-bit weights alone."""
    for key in ("kv_cache_scheme", "moe_sparsity_config"):
        if config.get(key):
            raise common.refuse(file, key, "none", config[key])
    sparsity = common.table(config, "sparsity_config", file)
    if sparsity.get("format", "dense") != "dense":
        raise common.refuse(file, "sparsity_config.format", "dense", sparsity["format"])
    if common.table(config, "transform_config", file).get("config_groups"):
        raise common.refuse(file, "transform_config", "none", config["transform_config"])
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(file=file, expected="config_groups: one group or more", found=repr(groups))
    default = config.get("format")
    parsed = tuple(_group(f"config_groups.{name}", name, g, default, file) for name, g in groups.items())
    return Scheme(parsed, _names(config.get("ignore") or [], "ignore", file))


def is_quantized(scheme: Scheme, name: str, ckpt: Checkpoint) -> bool:
    """Whether the linear module `name` is stored as int4. Raises CheckpointError where config and file disagree."""
    claim = scheme.group(name) is not None
    why = "a target of config_groups" if claim else "in ignore, or no target of config_groups"
    return common.stored_quantized(ckpt, name, _PACKED, claim, why)


def check(scheme: Scheme, name: str, ckpt: Checkpoint, shape: tuple[int, int]) -> common.Int4Kind:
    """Check module `name` for a weight of shape (N, K). Raises CheckpointError or UnsupportedError."""
    n, k = shape
    group = _group_of(scheme, name, ckpt)
    columns = common.group_columns(ckpt, f"{name}.{_PACKED}", group.group_size, k)
    groups = k // columns
    common.expect(ckpt, f"{name}.{_PACKED}", (torch.int32,), (n, -(-k // 8)))
    common.expect(ckpt, f"{name}.{_SCALE}", common.SCALE_DTYPES, (n, groups))
    common.expect(ckpt, f"{name}.{_SHAPE}", _INTEGERS, (2,))
    if not group.symmetric:
        common.expect(ckpt, f"{name}.{_ZERO}", (torch.int32,), (-(-n // 8), groups))
    if group.act_order:
        common.expect(ckpt, f"{name}.{_ORDER}", _INTEGERS, (k,))
    for suffix, wanted, why in ((_ZERO, not group.symmetric, "symmetric"), (_ORDER, group.act_order, "actorder is not group")):
        tensor = f"{name}.{suffix}"
        if tensor in ckpt and not wanted:
            raise CheckpointError(file=ckpt.info(tensor).file, tensor=tensor, expected=f"none ({why})", found="the tensor")
    return common.Int4Kind(columns, group.symmetric, _g_idx(group, name, ckpt, columns) is not None)


def shape(scheme: Scheme, name: str, ckpt: Checkpoint) -> tuple[int, int]:
    """(N, K) of a quantized module, as its `weight_shape` says."""
    common.expect(ckpt, f"{name}.{_SHAPE}", _INTEGERS, (2,))
    n, k = (int(size) for size in ckpt.read(f"{name}.{_SHAPE}"))
    if min(n, k) < 1:
        file = ckpt.info(f"{name}.{_SHAPE}").file
        raise CheckpointError(file=file, tensor=f"{name}.{_SHAPE}", expected="two sizes from 1 up", found=str([n, k]))
    return n, k


def read(scheme: Scheme, name: str, ckpt: Checkpoint, dtype: torch.dtype) -> Int4Weight:
    """Module `name`, checked; scales in `dtype` (bf16 or fp16). `packed` is a view of the file's pages, not a copy.

    Raises what `check` raises, and CheckpointError for scales that are not finite and a g_idx out of range.
    """
    n, k = shape(scheme, name, ckpt)
    columns = check(scheme, name, ckpt, (n, k)).group_size
    group = _group_of(scheme, name, ckpt)
    zeros = None
    if not group.symmetric:  # packed along N
        zeros = unpack_nibbles(ckpt.read(f"{name}.{_ZERO}").T)[:, :n].T.contiguous()
    return Int4Weight(
        packed=ckpt.read(f"{name}.{_PACKED}"),
        scales=common.read_scales(ckpt, f"{name}.{_SCALE}", dtype),
        zeros=zeros,
        g_idx=_g_idx(group, name, ckpt, columns),
        group_size=columns,
        in_features=k,
    )


def owned_tensors(name: str, ckpt: Checkpoint) -> list[str]:
    """The file's tensors that `read` covers, without the bias."""
    return [t for suffix in (_PACKED, _SCALE, _SHAPE, _ZERO, _ORDER) if (t := f"{name}.{suffix}") in ckpt]


def _g_idx(group: Group, name: str, ckpt: Checkpoint, columns: int) -> Tensor | None:
    return common.read_group_index(ckpt, f"{name}.{_ORDER}", columns) if group.act_order else None


def _group_of(scheme: Scheme, name: str, ckpt: Checkpoint) -> Group:
    group = scheme.group(name)
    if group is None:
        expected = "a module that config_groups targets and ignore does not name"
        raise CheckpointError(file=ckpt.source, tensor=f"{name}.{_PACKED}", expected=expected, found=name)
    return group


def _group(key: str, name: str, group: Any, default_format: Any, file: Path) -> Group:
    if isinstance(group, list):  # short form: {"W4A16": ["Linear"]}
        if name.upper() not in _PRESETS:
            raise common.refuse(file, key, f"a preset of {', '.join(_PRESETS)}", name)
        group = {"targets": group, "weights": _PRESETS[name.upper()]}
    if not isinstance(group, dict):
        raise CheckpointError(file=file, expected=f"{key}: an object", found=repr(group))
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise common.refuse(file, f"{key}.{part}", "none", group[part])
    stored = group.get("format") or default_format
    if stored != "pack-quantized":
        raise common.refuse(file, f"{key}.format", "pack-quantized", stored)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise common.refuse(file, f"{key}.weights", "an object", weights)
    for part, allowed in (("num_bits", (4,)), ("type", ("int",)), ("dynamic", (None, False)), ("block_structure", (None,))):
        if weights.get(part) not in allowed:
            raise common.refuse(file, f"{key}.weights.{part}", repr(allowed[-1]), weights.get(part))
    return Group(
        targets=_names(group.get("targets"), f"{key}.targets", file),
        group_size=_group_size(weights, f"{key}.weights", file),
        symmetric=common.boolean(weights, "symmetric", True, file),
        act_order=_act_order(weights.get("actorder"), f"{key}.weights.actorder", file),
    )


def _group_size(weights: dict[str, Any], key: str, file: Path) -> int | None:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None and size is not None:
        strategy = "channel" if size == -1 else "group"
    if strategy == "channel" and size in (None, -1):
        return None
    if strategy == "group":
        return common.group_size(common.integer(weights, "group_size", file), f"{key}.group_size", file)
    raise common.refuse(file, f"{key}.strategy", "group, or channel without group_size", f"{strategy}, group_size {size}")


def _act_order(value: object, key: str, file: Path) -> bool:
    if value in (None, False, "weight", "static"):  # "weight": only the order of calibration
        return False
    if value in (True, "group", "dynamic"):
        return True
    raise common.refuse(file, key, "null, weight, static, group or dynamic", value)


def _names(entries: Any, key: str, file: Path) -> Names:
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise CheckpointError(file=file, expected=f"{key}: a list of names", found=repr(entries))
    patterns = tuple(common.pattern(e[3:], key, file) for e in entries if e.startswith("re:"))
    return Names(frozenset(e for e in entries if not e.startswith("re:")), patterns)
