"""Bytes of the KV cache by the kinds of layers."""

import pytest
import torch

from twinweight import presets
from twinweight.engines.hf import kv_bytes_per_token
from twinweight.kv_cache import bytes_per_token, stateful, windowed
from twinweight.sharding import shard
from twinweight.synth import skeleton


@pytest.mark.parametrize(
    ("kinds", "keeping", "few", "states"),
    [
        (None, 4, 0, 0),
        (["full_attention"] * 4, 4, 0, 0),
        (["linear_attention"] * 3 + ["full_attention"], 1, 0, 3),
        (["sliding_attention", "full_attention"] * 2, 4, 2, 0),
        (["conv", "conv", "moe", "sliding_attention"], 1, 1, 2),
    ],
)
def test_layers_count_that_keep_tokens(kinds: list[str] | None, keeping: int, few: int, states: int) -> None:
    assert bytes_per_token(4, kinds, 2, 64, 2) == 2 * keeping * 2 * 64 * 2
    assert windowed(kinds) == few
    assert stateful(kinds) == states


def test_a_plan_and_a_loaded_model_agree_and_windows_are_told() -> None:
    config = presets.preset("gemma-3-1b")
    rank = shard(config)
    model = skeleton(config)
    assert rank.kv_bytes_per_token == kv_bytes_per_token(model.config, torch.bfloat16) == 2 * 26 * 256 * 2  # type: ignore[arg-type]
    assert any(note.startswith("22 of 26 layers keep a window") for note in rank.assumptions)


def test_experts_are_told() -> None:
    (note,) = (note for note in shard(presets.preset("qwen3-30b-a3b")).assumptions if "experts" in note)
    elements = 48 * 128 * 3 * 2048 * 768
    assert f"{(elements / 2 + elements / 128 * 2) / 2**30:.3f} GiB" in note
