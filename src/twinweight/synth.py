"""`twinweight synth`: random but valid W4A16 checkpoints of true shapes, for speed work without downloads.

Names and shapes come from the transformers model built on the meta device. Weights keep the variance of activations
(standard deviation 1/sqrt(fan-in)), so a deep random model stays finite in 16 bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from twinweight.errors import ConfigError
from twinweight.synth_formats import FORMATS, Entry, Recipe, dense, quantization_config

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""

MARKER = "synth.json"
"""Written last into every output: a directory that has it is a whole synth checkpoint and may be written over."""

_UNFINISHED = "synth.json.part"  # the marker while the rest is written: broken-off output may be written over too

_PER_EXPERT_MODELS = ("qwen3_moe",)
"""Mixtures whose fused 3-D experts are [expert, out, in] in transformers 5 and gate_proj, up_proj, down_proj on the hub."""


@dataclass(frozen=True)
class Written:
    """What `write` has put where. nbytes: of all tensors; quantized: 4-bit weights; parameters: those of the dense model."""

    path: Path
    parameters: int
    quantized: int
    nbytes: int
    shards: int


def write(
    config: dict[str, Any],
    out: Path,
    *,
    seed: int = 0,
    group_size: int = 128,
    symmetric: bool = True,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    shard_bytes: int = 1 << 30,
    format: Literal["compressed-tensors", "gptq", "awq"] = "compressed-tensors",
    progress: Progress | None = None,
) -> Written:
    """Write a random checkpoint of the model `config` (a `config.json` dictionary, see `presets`) into the directory `out`.

    group_size: input features under one scale; -1 for one scale an output feature.
    shard_bytes: size of a file (one tensor may be larger); about so much memory is needed.
    A tensor depends on its name, its shape and `seed` only: the same call writes the same bytes, and a model of fewer
    layers is a part of the whole one.
    Raises ConfigError where `out` holds something else, the disk is too small or the shapes cannot be quantized so.
    """
    recipe = Recipe(format, group_size, symmetric, dtype)
    if seed < 0 or shard_bytes < 1:
        raise ConfigError(f"expected seed >= 0 and shard_bytes >= 1, found seed={seed}, shard_bytes={shard_bytes}")
    model = skeleton(config)
    quantized = quantized_modules(model)
    entries = list(_entries(model, quantized, recipe))
    total = sum(e.nbytes for e in entries)
    _prepare(out, total, {"seed": seed, **asdict(recipe)})

    shards = list(_shards(entries, shard_bytes))
    weight_map: dict[str, str] = {}
    done = 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for entry in shard:
            tensors[entry.name] = entry.make(_generator(seed, entry.name))
            weight_map[entry.name] = file
            done += entry.nbytes
            if progress:
                progress(done, total)
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod((out / _UNFINISHED).stat().st_mode)  # safetensors leaves 0600: hidden from other users
    if len(shards) > 1:
        _dump(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

    text = config.get("text_config", config)
    tokens = {k: text[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if text.get(k) is not None}
    _dump(out / "generation_config.json", tokens)
    # After the tensors: no loader takes a directory without a config for a checkpoint.
    quantization = quantization_config(recipe, _ignored(model, quantized))
    _dump(out / "config.json", {**config, "torch_dtype": dtype, "quantization_config": quantization})
    (out / _UNFINISHED).replace(out / MARKER)
    parameters = sum(p.numel() for p in model.parameters())
    return Written(out, parameters, sum(e.name.endswith(("weight_packed", "qweight")) for e in entries), total, len(shards))


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The transformers model of a `config.json` dictionary on the meta device (no memory; tied weights are shared)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    plain = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    try:
        parsed = AutoConfig.for_model(config["model_type"], **plain)
    except (KeyError, ValueError) as e:
        raise ConfigError(f"transformers cannot read a config of model_type {config.get('model_type')!r}: {e}") from e
    auto: Any = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(parsed)
    return model


def _decoder_prefix(model: Any) -> str:
    """Name of the text decoder with a dot behind it ("model." or, beside a vision tower, "model.language_model.")."""
    decoder = model.get_decoder()
    names: list[str] = [name for name, module in model.named_modules() if module is decoder]
    return names[0] + "."


def quantized_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear module that a W4A16 checkpoint stores in 4 bits: those of the decoder, not the head or a tower."""
    prefix = _decoder_prefix(model)
    return {
        name: (m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith(prefix)
    }


def _ignored(model: nn.Module, quantized: dict[str, tuple[int, int]]) -> list[str]:
    """What stays dense, named so that a rule holds under any prefix: "lm_head", "visual", "mlp.gate" (the router)."""
    above = _decoder_prefix(model).rstrip(".").rpartition(".")[0]
    names: dict[str, None] = {"lm_head": None}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in quantized:
            names[name.removeprefix(above + ".").split(".")[0]] = None
        if name.endswith(".mlp.experts"):
            names["mlp.gate"] = None
    return list(names)


def _entries(model: Any, quantized: dict[str, tuple[int, int]], recipe: Recipe) -> Iterator[Entry]:
    """Every tensor of the checkpoint in the order of the model. Tied weights come once."""
    tied = set(model.all_tied_weights_keys)
    pack = FORMATS[recipe.format]
    for name, p in model.named_parameters():
        module_name, _, kind = name.rpartition(".")
        if name in tied:
            continue
        if module_name in quantized and kind == "weight":
            yield from pack(module_name, *quantized[module_name], recipe)
        elif p.ndim == 3 and module_name.endswith(".experts"):
            if model.config.model_type not in _PER_EXPERT_MODELS:
                raise ConfigError(f"synth writes the experts of {', '.join(_PER_EXPERT_MODELS)}, not {model.config.model_type}")
            experts, n, k = p.shape
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for e in range(experts):
                for part in parts:
                    yield from pack(f"{module_name}.{e}.{part}", n // len(parts), k, recipe)
        else:
            module = model.get_submodule(module_name)
            yield dense(name, tuple(p.shape), _constant(model, module, kind), recipe)


def _constant(model: Any, module: nn.Module, kind: str) -> float | None:
    """The value transformers starts a vector of `module` with (1 for most norms, 0 for Gemma's), None where random is right."""
    if module.get_parameter(kind).ndim != 1 or isinstance(module, nn.Linear):
        return None
    real = copy.deepcopy(module).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):  # a convolution beside its bias draws its weight from the global generator
        model._init_weights(real)
    return float(real.get_parameter(kind)[0].item())


def _shards(entries: list[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    """Consecutive entries of at most `shard_bytes` together; a larger tensor gets a file of its own."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.nbytes
    if shard:
        yield shard


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _prepare(out: Path, total: int, record: dict[str, Any]) -> None:
    """Make `out` an empty synth directory, or raise ConfigError with nothing touched."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: expected a directory or a new name")
    if out.is_dir() and any(out.iterdir()) and not any((out / m).is_file() for m in (MARKER, _UNFINISHED)):
        raise ConfigError(f"{out} holds files that synth did not write (no {MARKER}): not written over")
    old = [out / MARKER, out / "config.json", out / "model.safetensors.index.json", *out.glob("model*.safetensors")]
    reclaimed = sum(f.stat().st_size for f in old if f.is_file())
    existing = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free + reclaimed
    if total > free:
        raise ConfigError(f"{out}: the checkpoint takes {total / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free there")
    out.mkdir(parents=True, exist_ok=True)
    _dump(out / _UNFINISHED, {"note": "random weights written by twinweight synth", **record})
    for f in old:
        f.unlink(missing_ok=True)


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
