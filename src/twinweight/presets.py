"""Shapes of published models as plain `config.json` dictionaries, without quantization, for `synth` and the planner.

The values are those of the files on the Hugging Face hub, checked against copies in public repositories:
mlc-ai/mlc-llm `python/mlc_llm/model/model_preset.py` at 01ced33 (Qwen3, Llama, Mistral, Phi-4-mini, Qwen2.5),
pytorch/torchtitan `experiments/qwen3_vl/__init__.py` at 0375bb6 (Qwen3-VL-2B), zyzshishui/slime
`scripts/models/qwen3-30B-A3B.sh`; Gemma-3-1B from several that agree.
tests/test_presets.py compares the number of parameters of each with the published one.
"""

from __future__ import annotations

import copy
from typing import Any

from twinweight.errors import ConfigError

Config = dict[str, Any]


def _llama(hidden: int, intermediate: int, layers: int, heads: int, *, factor: float, **more: Any) -> Config:
    """Llama 3.1 to 3.3: 8 key-value heads, rope stretched by `factor`."""
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**rope, "original_max_position_embeddings": 8192},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "torch_dtype": "bfloat16",
        **more,
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool, **more: Any) -> Config:
    """Qwen3: head size 128 whatever the hidden size, norms on q and k."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
        **more,
    }


_QWEN3_30B_A3B = _qwen3(
    2048,
    6144,
    48,
    32,
    tied=False,
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_key_value_heads=4,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
)

_QWEN25_7B: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}

_MISTRAL_7B: Config = {  # v0.3
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

_GEMMA3_1B: Config = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}

# fmt: off
_PHI4_LONG_FACTOR = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826,
    3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
    8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807,
    22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
    33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on

_PHI4_MINI: Config = {  # fused qkv_proj and gate_up_proj, rotary on three quarters of each head
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "sliding_window": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "long_factor": _PHI4_LONG_FACTOR, "short_factor": [1.0] * 48},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "pad_token_id": 199999,
    "torch_dtype": "bfloat16",
}

_QWEN3_VL_2B: Config = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
        "hidden_act": "gelu_pytorch_tanh",
    },
}

_PRESETS: dict[str, Config] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "qwen3-vl-2b": _QWEN3_VL_2B,
    "qwen2.5-7b": _QWEN25_7B,
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, factor=32.0, tie_word_embeddings=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, factor=8.0),
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, factor=8.0),
    "mistral-7b": _MISTRAL_7B,
    "gemma-3-1b": _GEMMA3_1B,
    "phi-4-mini": _PHI4_MINI,
}

NAMES = tuple(_PRESETS)
"""The presets there are."""


def preset(name: str, layers: int | None = None) -> Config:
    """A fresh `config.json` dictionary of the preset `name`, cut to `layers` decoder layers (a vision tower stays whole).

    Raises ConfigError for an unknown name and for `layers` below 1 or above what the model has.
    """
    if name not in _PRESETS:
        raise ConfigError(f"unknown model shape {name!r}; known: {', '.join(NAMES)}")
    config = copy.deepcopy(_PRESETS[name])
    if layers is not None:
        text = config.get("text_config", config)
        if not 1 <= layers <= text["num_hidden_layers"]:
            raise ConfigError(f"{name} has {text['num_hidden_layers']} layers: --layers takes 1 to that, not {layers}")
        text["num_hidden_layers"] = layers
        if "max_window_layers" in text:  # transformers reads it together with the number of layers
            text["max_window_layers"] = min(layers, text["max_window_layers"])
    return config
