"""Presets have the published number of parameters, and only known names and layer counts are taken."""

from __future__ import annotations

import pytest

from twinweight import synth
from twinweight.errors import ConfigError
from twinweight.presets import NAMES, preset

PUBLISHED = {  # parameters of the files on the hub, tied embeddings counted once
    "qwen3-0.6b": 0.596e9,
    "qwen3-4b": 4.02e9,
    "qwen3-8b": 8.19e9,
    "qwen3-32b": 32.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-vl-2b": 2.13e9,
    "qwen2.5-7b": 7.62e9,
    "llama-3.2-1b": 1.24e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.3-70b": 70.6e9,
    "mistral-7b": 7.25e9,
    "gemma-3-1b": 1.00e9,
    "phi-4-mini": 3.84e9,
}


def test_every_preset_has_a_published_size() -> None:
    assert set(PUBLISHED) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    assert sum(p.numel() for p in synth.skeleton(preset(name)).parameters()) == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_layers_cut_the_decoder_only(name: str) -> None:
    whole, one, two = ({n for n, _ in synth.skeleton(preset(name, layers)).named_parameters()} for layers in (None, 1, 2))
    assert one < two <= whole
    assert not any(".layers.2." in n for n in two)
    assert sum("visual" in n for n in whole) == sum("visual" in n for n in one)


def test_presets_are_fresh_copies() -> None:
    preset("qwen3-vl-2b")["text_config"]["hidden_size"] = 1
    preset("phi-4-mini")["rope_scaling"]["long_factor"].clear()
    assert preset("qwen3-vl-2b")["text_config"]["hidden_size"] == 2048
    assert len(preset("phi-4-mini")["rope_scaling"]["long_factor"]) == 48


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown model shape 'gpt-5'.*llama-3\.1-8b"):
        preset("gpt-5")


@pytest.mark.parametrize("layers", [0, -1, 29])
def test_layers_out_of_range(layers: int) -> None:
    with pytest.raises(ConfigError, match="28 layers"):
        preset("qwen3-0.6b", layers)
