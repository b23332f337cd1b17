"""Every preset's architecture loads and generates, a vision-language model with its vision tower untouched."""

from pathlib import Path

import pytest
import torch

import twinweight
from tests.engines.test_hf import Fixed
from tests.helpers import latent_model
from tests.test_synth import tiny
from twinweight import presets, synth
from twinweight.bench import Workload, bench
from twinweight.engines.hf import kv_bytes_per_token
from twinweight.errors import ConfigError, UnsupportedError
from twinweight.twins import int4_linears

DENSE = [name for name in presets.NAMES if name != "qwen3-30b-a3b"]


@pytest.mark.parametrize("name", DENSE)
def test_it_loads_and_generates(name: str, tmp_path: Path) -> None:
    synth.write(tiny(name), tmp_path, group_size=32)
    model = twinweight.load(tmp_path, crossovers=Fixed(), progress=False, device="cpu")
    twinned = {n for n, m in int4_linears(model).items() if m.twin is not None}
    assert len(twinned) == 2 * (4 if name == "phi-4-mini" else 7)
    assert not any("visual" in n or "lm_head" in n for n in twinned)
    out = model.generate(torch.arange(3, 35)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 35)


def test_latent_attention_loads_and_its_cache_is_not_underestimated(tmp_path: Path) -> None:
    """DeepSeek's: keys of 48 + 16 and values of 32, of four heads, or a latent of 32 + 16, by the version of transformers."""
    config = latent_model(
        4, hidden_size=128, intermediate_size=256, kv_lora_rank=32, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=48,
        v_head_dim=32, vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    synth.write(config, tmp_path, group_size=32)
    model = twinweight.load(tmp_path, crossovers=Fixed(), progress=False, device="cpu")
    assert len([n for n, m in int4_linears(model).items() if m.twin is not None]) == 2 * 8
    out = model(torch.arange(3, 35)[None], use_cache=True)
    kept = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values) if t is not None)
    assert kept <= 32 * kv_bytes_per_token(model.config, model.dtype) == 32 * 2 * 4 * (48 + 16 + 32) * 2


def test_an_image_prompt_is_measured_like_any_other(tmp_path: Path) -> None:
    config = tiny("qwen3-vl-2b", vocab_size=256)
    config.update(image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)
    synth.write(config, tmp_path, group_size=32)
    model = twinweight.load(tmp_path, crossovers=Fixed(), progress=False, device="cpu")
    result = bench(model, Workload(prompt_tokens=16, output_tokens=3, image=(128, 64)), repeats=1)
    vision = model.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    assert result["workload"]["prompt_tokens"] == 16 + 2 + (128 // unit) * (64 // unit)
    assert result["workload"]["image"] == (128, 64)


def test_an_image_needs_a_vision_model(tmp_path: Path) -> None:
    synth.write(tiny("qwen3-0.6b"), tmp_path, group_size=32)
    model = twinweight.load(tmp_path, crossovers=Fixed(), progress=False, device="cpu")
    with pytest.raises(ConfigError, match="vision"):
        bench(model, Workload(prompt_tokens=16, output_tokens=3, image=(128, 64)), repeats=1)


def test_a_mixture_of_experts_is_left_to_vllm(tmp_path: Path) -> None:
    synth.write(tiny("qwen3-30b-a3b"), tmp_path, group_size=32)
    with pytest.raises(UnsupportedError, match="experts"):
        twinweight.load(tmp_path, crossovers=Fixed(), progress=False, device="cpu")
