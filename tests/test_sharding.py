"""One rank's share of a model: sizes of published models, split as vLLM splits them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import DEEPSEEK
from twinweight import presets
from twinweight.errors import ConfigError, UnsupportedError
from twinweight.sharding import shard
from twinweight.synth_formats import Recipe, quantization_config


def counts(name: str, tp: int) -> dict[str, int]:
    return dict(Counter(map(str, shard(presets.preset(name), tp).weights.values())))


@pytest.mark.parametrize(
    ("name", "tp", "expected"),
    [
        ("llama-3.1-8b", 1, {"6144x4096": 32, "4096x4096": 32, "28672x4096": 32, "4096x14336": 32}),
        ("llama-3.1-8b", 2, {"3072x4096": 32, "4096x2048": 32, "14336x4096": 32, "4096x7168": 32}),
        ("llama-3.1-8b", 16, {"512x4096": 32, "4096x256": 32, "1792x4096": 32, "4096x896": 32}),  # 2 heads, a KV head each
        ("llama-3.3-70b", 2, {"5120x8192": 80, "8192x4096": 80, "28672x8192": 80, "8192x14336": 80}),
        ("qwen3-30b-a3b", 1, {"5120x2048": 48, "2048x4096": 48}),  # experts have no twin
        ("phi-4-mini", 2, {"2560x3072": 32, "3072x1536": 32, "8192x3072": 32, "3072x4096": 32}),  # stored fused
        ("gemma-3-1b", 2, {"1024x1152": 26, "1152x512": 26, "6912x1152": 26, "1152x3456": 26}),  # one KV head, on both
        ("qwen3-vl-2b", 1, {"4096x2048": 28, "2048x2048": 28, "12288x2048": 28, "2048x6144": 28}),
    ],
)
def test_shapes(name: str, tp: int, expected: dict[str, int]) -> None:
    assert counts(name, tp) == expected


def config_of(kind: str, architecture: str, **more: Any) -> dict[str, Any]:
    """A small model of transformers, by its defaults."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.for_model(kind, vocab_size=1024, hidden_size=256, **more).to_dict()
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    return {**config, "architectures": [architecture]}


FALCON = {"num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    ("kind", "architecture", "more", "tp", "expected"),
    [
        # The gate of Qwen3.5's attention is in its q_proj, which is twice as wide.
        ("qwen3_5_text", "Qwen3_5ForCausalLM", LLAMA_LIKE, 1, {"768x256", "256x256"}),
        ("qwen3_5_text", "Qwen3_5ForCausalLM", LLAMA_LIKE, 2, {"384x256", "256x128"}),
        # Heads of 512 in layers of full attention, of 64 in the others.
        ("gemma4_text", "Gemma4ForCausalLM", LLAMA_LIKE, 1, {"512x256", "4096x256", "256x256", "256x2048"}),
        ("falcon", "FalconForCausalLM", FALCON, 1, {"384x256", "256x256", "256x1024"}),
        ("falcon", "FalconForCausalLM", FALCON, 2, {"256x256", "256x128", "256x512"}),  # its one KV head on both
        (
            "gpt_neox", "GPTNeoXForCausalLM", {"intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}, 2,
            {"384x256", "256x128", "256x256"},
        ),
    ],
)  # fmt: skip
def test_shapes_are_those_of_the_model_and_not_of_a_formula(
    kind: str, architecture: str, more: dict[str, Any], tp: int, expected: set[str]
) -> None:
    assert expected <= set(map(str, shard(config_of(kind, architecture, **more), tp).weights.values()))


def test_a_kv_cache_of_layers_that_differ_is_counted_layer_by_layer() -> None:
    """Five layers of 2 heads of 64, one of 2 heads of 512, keys and values, 2 bytes each."""
    from twinweight.engines.hf import kv_bytes_per_token

    config = config_of("gemma4_text", "Gemma4ForCausalLM", **LLAMA_LIKE)
    expected = 2 * 2 * 2 * (5 * 64 + 512)
    assert shard(config).kv_bytes_per_token == expected
    assert shard(config, 2).kv_bytes_per_token == expected // 2
    from transformers import AutoConfig

    for some, nbytes in ((config, expected), (config_of("falcon", "FalconForCausalLM", **FALCON), 2 * 2 * 2 * 64)):
        fields = {k: v for k, v in some.items() if k != "model_type"}
        assert kv_bytes_per_token(AutoConfig.for_model(some["model_type"], **fields), torch.bfloat16) == nbytes


@pytest.mark.parametrize(("tp", "expected"), [(1, 131072), (2, 65536), (8, 16384), (16, 16384)])
def test_the_kv_cache_splits_by_heads_and_no_further(tp: int, expected: int) -> None:
    """Keys and values of 32 layers, 8 heads of 128, in 16 bits."""
    assert shard(presets.preset("llama-3.1-8b"), tp).kv_bytes_per_token == expected


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen3-30b-a3b", "qwen3-vl-2b", "qwen2.5-7b"])
def test_every_byte_is_counted_once(name: str) -> None:
    """Against the number of parameters: int4 with a 16-bit scale for 128, everything else in 16 bits."""
    from twinweight.synth import quantized_modules, skeleton

    config = presets.preset(name)
    model = skeleton(config)
    parameters = dict(model.named_parameters())
    int4 = sum(parameters[f"{n}.weight"].numel() for n in quantized_modules(model))
    int4 += sum(p.numel() for n, p in parameters.items() if p.ndim == 3 and ".experts." in n)
    rank = shard(config)
    expected = int4 // 2 + int4 // 128 * 2 + 2 * (sum(p.numel() for p in parameters.values()) - int4)
    assert rank.weight_bytes == pytest.approx(expected, rel=2e-4)  # the vocabulary is padded
    assert shard(config, 2).weight_bytes < 0.6 * rank.weight_bytes or name == "qwen3-vl-2b"


@pytest.mark.parametrize("tp", [1, 8])
def test_latent_attention(tp: int) -> None:
    """As vLLM has it: latents, and what compresses to them, whole on every rank; heads, and what expands to them, split."""
    rank = shard(DEEPSEEK, tp)
    attention = {"2112x7168", f"{24576 // tp}x1536", f"{32768 // tp}x512", f"7168x{16384 // tp}"}
    dense, shared = (({f"{2 * n // tp}x7168", f"7168x{n // tp}"}) for n in (18432, 2048))
    found = Counter(map(str, rank.weights.values()))
    assert found == dict.fromkeys(attention, 3) | dict.fromkeys(dense, 1) | dict.fromkeys(shared, 2)
    assert "model.layers.0.self_attn.fused_qkv_a_proj" in rank.weights
    assert rank.kv_bytes_per_token == 3 * (512 + 64) * 2
    assert rank.head_dims == 128 // tp * (128 + 64)
    experts = 2 * 256 * 3 * 2048 * 7168 // tp
    assert rank.expert_weights == experts
    twice = 3 * 32768 // tp * 512 * 2  # in 16 bits, for decode
    embeddings, router, norms = 2 * 129280 * 7168 * 2 // tp, 2 * 256 * 7168 * 2, 3 * (2 * 7168 + 1536 + 512) * 2 + 7168 * 2
    assert rank.other_bytes == experts // 2 + experts // 128 * 2 + twice + embeddings + router + norms


def test_latent_attention_whose_queries_are_not_compressed() -> None:
    """As in DeepSeek-V2-Lite."""
    rank = shard(DEEPSEEK | {"q_lora_rank": None}, 2)
    names = {name.rpartition("self_attn.")[2] for name in rank.weights if ".0.self_attn" in name}
    assert names == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    kinds = {str(rank.weights[f"model.layers.0.self_attn.{name}"]) for name in ("q_proj", "kv_a_proj_with_mqa")}
    assert kinds == {f"{128 * 192 // 2}x7168", "576x7168"}


def quantized(**changes: Any) -> dict[str, Any]:
    """One layer of Llama-3.2-1B with a quantization config."""
    base = quantization_config(Recipe("compressed-tensors", 128, True, "bfloat16"), ["lm_head"])
    return presets.preset("llama-3.2-1b", 1) | {"quantization_config": base | changes}


GROUP = {
    "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False, "dynamic": False,
    "actorder": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "group_size", "symmetric", "act_order"),
    [
        (quantized(), 128, True, False),
        (quantized(config_groups={"g": {"targets": ["Linear"], "weights": GROUP}}), 32, False, False),
        (quantized(config_groups={"g": {"targets": ["Linear"], "weights": GROUP | {"actorder": "group"}}}), 32, False, True),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": True}, 64, True, True),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}, 2048, False, False),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 128, False, False),
    ],
)
def test_quantization_configs(config: dict[str, Any], group_size: int, symmetric: bool, act_order: bool) -> None:
    if "quant_method" in config:
        config = presets.preset("llama-3.2-1b", 1) | {"quantization_config": config}
    rank = shard(config)
    kind = rank.weights["model.layers.0.self_attn.qkv_proj"]
    assert (kind.group_size, kind.symmetric, kind.act_order) == (group_size, symmetric, act_order)
    assert rank.assumptions == ()
    assert len(rank.weights) == 4


def test_what_is_assumed_is_said() -> None:
    assert "groups of 128" in shard(presets.preset("llama-3.2-1b", 1)).assumptions[0]


def test_ignored_modules_are_dense() -> None:
    rank, whole = shard(quantized(ignore=["lm_head", "re:.*down_proj"])), shard(quantized())
    assert "model.layers.0.mlp.down_proj" not in rank.weights
    down = whole.weights["model.layers.0.mlp.down_proj"]
    assert rank.weight_bytes - whole.weight_bytes == 2 * down.n * down.k - down.nbytes


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}


@pytest.mark.parametrize(
    ("quantization", "int4"),
    [
        (quantized()["quantization_config"], False),
        (quantized(ignore=[])["quantization_config"], True),
        (GPTQ, False),
        (GPTQ | {"lm_head": True}, True),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, False),
        (None, False),
    ],
)
def test_an_output_head_of_int4_takes_a_quarter(quantization: dict[str, Any] | None, int4: bool) -> None:
    """Where the configuration says so, and it is not the embedding."""
    config = presets.preset("llama-3.2-1b", 1) | ({"quantization_config": quantization} if quantization else {})
    tied, own = shard(config, 2), shard(config | {"tie_word_embeddings": False}, 2)
    rows, columns = 128256 // 2, 2048
    size = 64 if quantization and quantization["quant_method"] == "gptq" else 128
    expected = rows * columns // 2 + rows * columns // size * 2 if int4 else rows * columns * 2
    assert own.other_bytes - tied.other_bytes == expected
    assert own.embedding_bytes == rows * columns * 2
    assert own.weights == tied.weights


@pytest.mark.parametrize(
    ("config", "tp", "error", "message"),
    [
        (presets.preset("llama-3.2-1b", 1), 3, ConfigError, "--tp 3: 32 attention and 8 key-value heads"),
        (presets.preset("gemma-3-1b", 1), 8, ConfigError, "--tp 8"),
        (presets.preset("llama-3.2-1b", 1), 32, ConfigError, "groups of 128"),
        (presets.preset("llama-3.2-1b", 1) | {"kv_lora_rank": 512}, 1, ConfigError, "latent attention .* not of llama"),
        (DEEPSEEK | {"index_topk": 64}, 1, ConfigError, "latent attention"),
        (quantized(quant_method="fp8"), 1, UnsupportedError, "fp8"),
        (quantized(ignore=["re:.*q_proj"]), 1, UnsupportedError, "quantized alike"),
        (quantized(config_groups={"g": {"targets": ["Linear"], "weights": GROUP | {"num_bits": 8}}}), 1, UnsupportedError, "8"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: dict[str, Any], tp: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shard(config, tp, Path("config.json"))
