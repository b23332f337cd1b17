"""Models for real vLLM: the trained one that ships, its first layers in other formats, and a random one."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.formats.writers import QuantCase, write_awq, write_checkpoint, write_compressed_tensors, write_gptq
from tests.helpers import latent_model
from twinweight.presets import preset
from twinweight.synth import write

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "vllm-models" / os.environ.get("PYTEST_XDIST_WORKER", "")
"""Each process of tests writes its own."""
TRAINED = str(min(ROOT.glob("models/*/config.json")).parent)
SHORT = 2  # layers of the models cut from the trained one
TEXT = (Path(TRAINED) / "heldout.txt").read_text()
SLICES = ((36000, 120), (24000, 2600), (44000, 30))
"""Start and length of the prompts: some 40, 800 and 10 tokens."""

TOKENIZER = Tokenizer.from_file(str(Path(TRAINED) / "tokenizer.json"))
PROMPTS = tuple(tuple(TOKENIZER.encode(TEXT[at : at + length]).ids) for at, length in SLICES)


def linears(directory: str) -> int:
    """How many layers vLLM makes of a Llama's: q, k and v are one, and so are gate and up."""
    return 4 * int(json.loads((Path(directory) / "config.json").read_text())["num_hidden_layers"])


@functools.cache
def synthetic(seed: int) -> str:
    """A random model of two layers."""
    out = BUILD / f"synthetic-{seed}"
    write(_small(), out, seed=seed)
    return str(out)


@functools.cache
def latent() -> str:
    """A random model of two layers with DeepSeek's latent attention, without experts."""
    config = latent_model(
        8, hidden_size=512, intermediate_size=1536, q_lora_rank=256, vocab_size=4096, max_position_embeddings=4096
    )  # fmt: skip
    write(config, BUILD / "latent")
    return str(BUILD / "latent")


def without_int4() -> str:
    """The configuration of one like it, whose weights are dense; there are none."""
    out = BUILD / "without-int4"
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(_small()))
    return str(out)


def _small() -> dict[str, Any]:
    small = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return {**preset("llama-3.1-8b", layers=2), **small, "vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2}


@functools.cache
def short(format: str = "compressed-tensors", group_size: int = 128) -> str:
    """The first layers of the trained model, their weights to the bit, in a format; smaller groups repeat their scales."""
    config, quantized, dense = _short()
    modules = {name: _regrouped(case, group_size, zeros=format == "awq") for name, case in quantized.items()}
    out = BUILD / f"short-{format}-{group_size}"
    writer = {"compressed-tensors": write_compressed_tensors, "gptq": write_gptq, "awq": write_awq}[format]
    writer(out, config, modules, dense)
    return str(out)


@functools.cache
def int4_head() -> str:
    """The same in GPTQ with an output head of int4, which is the embedding rounded."""
    config, quantized, dense = _short()
    weight = dense["model.embed_tokens.weight"].float().unflatten(1, (-1, 128))
    scales = (weight.abs().amax(-1) / 7).bfloat16()
    values = (weight / scales.float()[..., None]).round().clamp(-8, 7) + 8
    head = QuantCase(values.flatten(1).to(torch.uint8), scales, group_size=128)
    modules = {name: _regrouped(case, 128, zeros=False) for name, case in quantized.items()}
    write_gptq(BUILD / "int4-head", {**config, "tie_word_embeddings": False}, {**modules, "lm_head": head}, dense)
    return str(BUILD / "int4-head")


@functools.cache
def short_w8() -> str:
    """The same in 8 bits: scales a sixteenth, values sixteen times as large."""
    config, quantized, dense = _short()
    tensors = dict(dense)
    for name, case in quantized.items():
        values = (case.values.int() - 8) * 16 + 128
        words = (values.view(len(values), -1, 4) << torch.tensor([0, 8, 16, 24])).sum(-1).to(torch.int32)
        tensors |= {
            f"{name}.weight_packed": words,
            f"{name}.weight_scale": case.scales / 16,
            f"{name}.weight_shape": torch.tensor(case.shape),
        }
    given = json.loads((Path(TRAINED) / "config.json").read_text())["quantization_config"]
    given["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    write_checkpoint(BUILD / "short-w8", {**config, "quantization_config": given}, tensors)
    return str(BUILD / "short-w8")


@functools.cache
def adapter() -> str:
    """A LoRA adapter for the trained model that changes what it says: rank 8, on every kind of linear layer."""
    out, generator = BUILD / "adapter", torch.Generator().manual_seed(0)
    _, quantized, _ = _short()
    tensors = {}
    for name, case in quantized.items():
        n, k = case.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, k, generator=generator) * k**-0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n, 8, generator=generator) * 0.1
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.bfloat16() for k, v in tensors.items()}, out / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in quantized})
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": targets,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return str(out)


@functools.cache
def ray_platform() -> str:
    """A directory for PYTHONPATH with a platform plugin: vLLM's CPU platform, which 0.32 keeps from Ray, and a Ray resource."""
    out = BUILD / "ray-platform"
    info = out / "raycpu-0.1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: raycpu\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nraycpu = raycpu:register\n")
    (out / "raycpu.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\n\n\n"
        "class RayCpuPlatform(CpuPlatform):\n    ray_device_key = 'GPU'\n\n\n"
        "def register():\n    return 'raycpu.RayCpuPlatform'\n"
    )
    return str(out)


@functools.cache
def _short() -> tuple[dict[str, Any], dict[str, QuantCase], dict[str, Tensor]]:
    """config.json without quantization, int4 modules, other tensors."""
    config = json.loads((Path(TRAINED) / "config.json").read_text())
    config.update(num_hidden_layers=SHORT)
    del config["quantization_config"]
    tensors = {n: t for n, t in load_file(Path(TRAINED) / "model.safetensors").items() if _layer(n) < SHORT}
    quantized = {}
    for name in [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]:
        packed, scales = tensors.pop(f"{name}.weight_packed"), tensors.pop(f"{name}.weight_scale")
        tensors.pop(f"{name}.weight_shape", None)
        values = (packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        quantized[name] = QuantCase(values.flatten(1).to(torch.uint8), scales, group_size=128)
    return config, quantized, tensors


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else 0


def _regrouped(case: QuantCase, group_size: int, *, zeros: bool) -> QuantCase:
    scales = case.scales.repeat_interleave(128 // group_size, dim=1)
    return QuantCase(case.values, scales, torch.full(scales.shape, 8, dtype=torch.uint8) if zeros else None, None, group_size)
