"""Checkpoints for tests, written the way each format's own tools pack them and independently of `twinweight.formats`.

compressed-tensors goes through that package's compressor. GPTQ and AWQ are written down from the published packings
(GPTQ: AutoGPTQ and GPTQModel `pack`; AWQ: AutoAWQ `WQLinear_GEMM.from_linear`), as plain loops.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class QuantCase:
    """A quantized linear module, as plain numbers.

    values: uint8 [N, K] in 0..15. scales: fp16 or bf16 [N, G]. zeros: uint8 [N, G], None for symmetric (8 everywhere).
    g_idx: int32 [K], None for groups in order. group_size: columns in a group, None per channel. bias: [N].
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None
    group_size: int | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def groups(self) -> Tensor:
        """The group of each column, int64 [K]."""
        k = self.shape[1]
        return self.g_idx.long() if self.g_idx is not None else torch.arange(k) // (self.group_size or k)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], rounded once to `dtype` (default: that of the scales), column by column."""
        dense = torch.empty(self.shape, dtype=torch.float64)
        for k, group in enumerate(self.groups().tolist()):
            zero = self.zeros[:, group].double() if self.zeros is not None else 8.0
            dense[:, k] = (self.values[:, k].double() - zero) * self.scales[:, group].double()
        return dense.to(dtype or self.scales.dtype)


def random_case(
    n: int,
    k: int,
    group_size: int | None,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    seed: int = 0,
) -> QuantCase:
    """A random module [n, k] whose dense weight has about unit output variance; zero points cover all of 0..15."""
    generator = torch.Generator().manual_seed(seed)
    columns = group_size or k
    groups = k // columns
    g_idx = torch.arange(k, dtype=torch.int32) // columns
    return QuantCase(
        values=torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8),
        scales=((torch.rand(n, groups, generator=generator) + 0.5) * 0.2 * k**-0.5).to(dtype),
        zeros=None if symmetric else torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8),
        g_idx=g_idx[torch.randperm(k, generator=generator)] if act_order else None,
        group_size=group_size,
        bias=torch.randn(n, generator=generator).to(dtype) if bias else None,
    )


def quantize(weight: Tensor, group_size: int | None, *, symmetric: bool = True, dtype: torch.dtype | None = None) -> QuantCase:
    """Round-to-nearest quantization of a float weight [N, K], for models that should make sense."""
    n, k = weight.shape
    blocks = weight.float().view(n, -1, group_size or k)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    spread = torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15
    scales = spread.clamp(min=1e-6).to(dtype or weight.dtype)
    zeros = None if symmetric else (-low / scales.float()).round().clamp(0, 15).to(torch.uint8)
    offset = zeros.float() if zeros is not None else torch.full_like(low, 8)
    values = (blocks / scales.float()[..., None]).round() + offset[..., None]
    return QuantCase(values.clamp(0, 15).to(torch.uint8).view(n, k), scales, zeros, None, group_size)


def write_checkpoint(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, shards: int = 1) -> None:
    """config.json and safetensors, with an index where there are several shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=1))
    owned = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(owned, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(owned)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: owned[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_compressed_tensors(
    directory: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, QuantCase],
    dense: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 1,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """A `pack-quantized` checkpoint. quantization: entries that replace those of the generated quantization_config."""
    dense = dense or {}
    tensors = dict(dense)
    for name, case in modules.items():
        tensors |= {f"{name}.{leaf}": t for leaf, t in pack_compressed_tensors(case).items()}
    generated = compressed_tensors_config(modules, dense) | dict(quantization or {})
    write_checkpoint(directory, dict(config) | {"quantization_config": generated}, tensors, shards=shards)


def compressed_tensors_config(modules: Mapping[str, QuantCase], dense: Mapping[str, Tensor]) -> dict[str, Any]:
    """One config group for all `Linear` where the modules are alike, else one group a kind with the modules by name."""
    kinds: dict[tuple[int | None, bool, bool], list[str]] = {}
    for name, case in modules.items():
        kinds.setdefault((case.group_size, case.zeros is None, case.g_idx is not None), []).append(name)
    groups = {}
    for i, ((group_size, symmetric, act_order), names) in enumerate(kinds.items()):
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if group_size else "channel",
            "group_size": group_size,
            "actorder": "group" if act_order else None,
            "block_structure": None,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        targets = ["Linear"] if len(kinds) == 1 else names
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    ignore = [n.removesuffix(".weight") for n, t in dense.items() if n.endswith(".weight") and t.ndim == 2]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": ignore,
    }


def pack_compressed_tensors(case: QuantCase) -> dict[str, Tensor]:
    """The tensors of one module by leaf name, packed by the compressed-tensors package (g_idx, which it lost, by hand)."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    # Its compressor quantizes floats: (q - z) * s in float32 gives q back exactly. With an order, groups are made
    # contiguous first, and the values (not the packed words) put back in the file's column order.
    order = torch.argsort(case.groups(), stable=True)
    straight = QuantCase(case.values[:, order], case.scales, case.zeros, None, case.group_size)
    state = {"weight": straight.dense(torch.float32), "weight_scale": case.scales}
    if case.zeros is not None:
        state["weight_zero_point"] = (case.zeros.to(torch.int16) - 8).to(torch.int8)
    packed = PackedQuantizationCompressor.compress(state, compressed_tensors_scheme(case))
    if case.g_idx is not None:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        packed["weight_packed"] = pack_to_int32((case.values.to(torch.int16) - 8).to(torch.int8), 4)
        packed["weight_g_idx"] = case.g_idx
    return packed | ({"bias": case.bias} if case.bias is not None else {})


def compressed_tensors_scheme(case: QuantCase) -> Any:
    """The package's own scheme object for a module."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if case.group_size else "channel"
    args = QuantizationArgs(num_bits=4, strategy=strategy, group_size=case.group_size, symmetric=case.zeros is None)
    return QuantizationScheme(targets=["Linear"], weights=args)


def write_gptq(
    directory: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, QuantCase],
    dense: Mapping[str, Tensor] | None = None,
    *,
    v2: bool = False,
    shards: int = 1,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """A GPTQ checkpoint, v1 as GPTQModel writes it. The modules must agree in group size, symmetry and order."""
    tensors = dict(dense or {})
    for name, case in modules.items():
        tensors |= {f"{name}.{leaf}": t for leaf, t in pack_gptq(case, v2=v2).items()}
    first = next(iter(modules.values()))
    generated = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": first.group_size or -1,
        "desc_act": first.g_idx is not None,
        "sym": first.zeros is None,
        "lm_head": "lm_head" in modules,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "meta": {"quantizer": ["gptqmodel:5.0.0"]},
    }
    quantized = dict(config) | {"quantization_config": generated | dict(quantization or {})}
    write_checkpoint(directory, quantized, tensors, shards=shards)


def pack_gptq(case: QuantCase, *, v2: bool = False) -> dict[str, Tensor]:
    """The tensors of one module: values packed eight k in a word, zero points eight n in a word, the lowest first."""
    n, k = case.shape
    groups = case.scales.shape[1]
    zeros = case.zeros if case.zeros is not None else torch.full((n, groups), 8, dtype=torch.uint8)
    qweight = torch.zeros(-(-k // 8), n, dtype=torch.int64)
    for column in range(k):
        qweight[column // 8] |= case.values[:, column].long() << 4 * (column % 8)
    qzeros = torch.zeros(groups, -(-n // 8), dtype=torch.int64)
    for row in range(n):
        qzeros[:, row // 8] |= zeros[row].long() << 4 * (row % 8)
    if not v2:
        # GPTQModel subtracts 1 in all eight places of a word at once, so a zero point 0 borrows from its neighbour
        qzeros -= 0x11111111
    tensors = {
        "qweight": _as_int32(qweight),
        "qzeros": _as_int32(qzeros),
        "scales": case.scales.T.contiguous(),
        "g_idx": case.groups().to(torch.int32),
    }
    return tensors | ({"bias": case.bias} if case.bias is not None else {})


def write_awq(
    directory: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, QuantCase],
    dense: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 1,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """An AWQ checkpoint in gemm order. The modules must agree in group size and symmetry; N must be a multiple of 8."""
    tensors = dict(dense or {})
    for name, case in modules.items():
        tensors |= {f"{name}.{leaf}": t for leaf, t in pack_awq(case).items()}
    first = next(iter(modules.values()))
    generated = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": first.group_size or -1,
        "zero_point": first.zeros is not None,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    quantized = dict(config) | {"quantization_config": generated | dict(quantization or {})}
    write_checkpoint(directory, quantized, tensors, shards=shards)


def pack_awq(case: QuantCase) -> dict[str, Tensor]:
    """The tensors of one module: eight n in a word, in the order 0 2 4 6 1 3 5 7; symmetric ones have no zero points."""
    if case.g_idx is not None:
        raise ValueError("AWQ has no g_idx")
    tensors = {"qweight": _awq_words(case.values.T), "scales": case.scales.T.contiguous()}
    if case.zeros is not None:
        tensors["qzeros"] = _awq_words(case.zeros.T)
    return tensors | ({"bias": case.bias} if case.bias is not None else {})


def _awq_words(values: Tensor) -> Tensor:
    rows, n = values.shape
    words = torch.zeros(rows, n // 8, dtype=torch.int64)
    for word in range(n // 8):
        for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, word] |= values[:, 8 * word + column].long() << 4 * place
    return _as_int32(words)


def _as_int32(words: Tensor) -> Tensor:
    return (((words + 2**31) % 2**32) - 2**31).to(torch.int32)
