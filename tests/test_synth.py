"""Synthetic checkpoints: complete, of the right shapes, deterministic, readable by transformers and numerically sane."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from twinweight import synth
from twinweight.errors import ConfigError
from twinweight.presets import preset
from twinweight.weight import Int4Weight, unpack_nibbles

SMALL = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "vocab_size": 512}
ARCHITECTURES = ("qwen3-0.6b", "qwen3-vl-2b", "qwen2.5-7b", "llama-3.1-8b", "mistral-7b", "gemma-3-1b", "phi-4-mini")
FORMATS = ("compressed-tensors", "gptq", "awq")


def tiny(name: str, layers: int = 2, **more: Any) -> dict[str, Any]:
    """The architecture of a preset at a size for tests."""
    config = preset(name)
    text = config.get("text_config", config)
    text.update({**SMALL, "num_key_value_heads": min(2, text["num_key_value_heads"]), "num_hidden_layers": layers, **more})
    if "head_dim" in text:
        text["head_dim"] = 64
    if name == "qwen3-vl-2b":
        config["vision_config"].update(hidden_size=64, intermediate_size=96, depth=3, num_heads=4, out_hidden_size=128)
        config["vision_config"].update(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
        text["rope_scaling"] = {**text["rope_scaling"], "mrope_section": [12, 10, 10]}
    elif name == "phi-4-mini":  # three quarters of a head of 32 turn, in pairs
        config["rope_scaling"].update(long_factor=[1.0] * 12, short_factor=[1.0] * 12)
        config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return config


def tensors(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def unpack_columns(words: Tensor) -> Tensor:
    """[R, C] words of eight nibbles -> [R, 8 C], low nibble first; written down apart from the package."""
    return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1)


def compressed_weight(found: dict[str, Tensor], module: str, group_size: int) -> Int4Weight:
    scales, k = found[f"{module}.weight_scale"], int(found[f"{module}.weight_shape"][1])
    zeros = found.get(f"{module}.weight_zero_point")
    if zeros is not None:
        zeros = unpack_nibbles(zeros.t().contiguous()).t()[: scales.shape[0]].contiguous()
    return Int4Weight(found[f"{module}.weight_packed"], scales, zeros, None, group_size if group_size > 0 else k, k)


def dequantized(found: dict[str, Tensor], module: str, format: str, group_size: int) -> Tensor:
    """float64 [N, K]."""
    if format == "compressed-tensors":
        return compressed_weight(found, module, group_size).dequantize(torch.float64)
    qweight, scales = found[f"{module}.qweight"], found[f"{module}.scales"].double()
    zeros = unpack_columns(found[f"{module}.qzeros"])
    if format == "gptq":
        values, zeros = unpack_columns(qweight.t()).t(), zeros + 1
    else:
        order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # nibble of output 8 i + j in a word
        values = unpack_columns(qweight).unflatten(1, (-1, 8))[:, :, order].flatten(1)
        zeros = zeros.unflatten(1, (-1, 8))[:, :, order].flatten(1)
    group = torch.arange(values.shape[0]) // (values.shape[0] // scales.shape[0])
    return ((values - zeros[group]).double() * scales[group]).t()


def dense_state(path: Path, group_size: int) -> dict[str, Tensor]:
    """The checkpoint as the dense model's state dict."""
    found = tensors(path)
    state = {k: v for k, v in found.items() if not k.startswith("weight_", k.rfind(".") + 1)}
    for name in found:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            state[f"{module}.weight"] = compressed_weight(found, module, group_size).dequantize()
    return state


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_complete_and_finite_in_transformers(name: str, dtype: Any, tmp_path: Path) -> None:
    config = tiny(name)
    written = synth.write(config, tmp_path, group_size=32, dtype=dtype)
    skeleton = synth.skeleton(config)
    state = dense_state(tmp_path, 32)

    expected = {k: tuple(p.shape) for k, p in skeleton.named_parameters()}
    assert {k: tuple(v.shape) for k, v in state.items()} == expected
    assert {v.dtype for v in state.values()} == {getattr(torch, dtype)}
    assert written.parameters == sum(v.numel() for v in state.values())
    assert written.nbytes == sum(v.numel() * v.element_size() for v in tensors(tmp_path).values())
    packed = {k for k in tensors(tmp_path) if k.endswith("weight_packed")}
    assert len(packed) == written.quantized == 2 * (4 if name == "phi-4-mini" else 7)
    assert not any("lm_head" in k or "visual" in k for k in packed)

    model = skeleton.to_empty(device="cpu").to(getattr(torch, dtype))
    fresh = type(model)(model.config).to(getattr(torch, dtype)).eval()  # type: ignore[attr-defined]
    missing = fresh.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    with torch.no_grad():
        logits = fresh(torch.arange(3, 67).view(2, 32)).logits.float()
    assert logits.isfinite().all()
    assert 0.2 < logits.std() < 5


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-vl-2b", "gemma-3-1b"])
def test_from_pretrained_reads_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    synth.write(tiny(name), tmp_path, group_size=32)
    auto = transformers.AutoModelForImageTextToText if "vl" in name else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits
    expected = dense_state(tmp_path, 32)
    probe = next(k for k in expected if k.endswith("1.self_attn.o_proj.weight"))
    torch.testing.assert_close(model.get_parameter(probe).data, expected[probe])
    assert logits.isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_compressed_tensors_reads_the_same_weights(symmetric: bool, group_size: int, tmp_path: Path) -> None:
    # its decompressor, not from_pretrained: with compressed-tensors 0.20 that takes no packed zero points (expects [N, groups])
    pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    scheme = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
    synth.write(tiny("llama-3.1-8b", layers=1), tmp_path, group_size=group_size, symmetric=symmetric)
    found = tensors(tmp_path)
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    for module in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.0.{module}"
        state = {k.removeprefix(f"{name}."): v for k, v in found.items() if k.startswith(f"{name}.")}
        theirs = pack_quantized.PackedQuantizationCompressor.decompress(state, scheme(**group))["weight"]
        assert torch.equal(theirs, compressed_weight(found, name, group_size).dequantize())


def test_deep_model_stays_finite_and_tells_tokens_apart(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny("llama-3.1-8b", layers=48)
    synth.write(config, tmp_path, group_size=64)
    parsed = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    model = transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16).eval()
    model.load_state_dict(dense_state(tmp_path, 64))
    with torch.no_grad():
        out = model(torch.arange(100, 132)[None], output_hidden_states=True)
    assert out.logits.isfinite().all()
    assert out.hidden_states[-2].float().std() < 20
    states = torch.nn.functional.normalize(out.hidden_states[-1][0].float(), dim=-1)
    assert (states @ states.T).mean() < 0.95


class Case(NamedTuple):
    format: str
    symmetric: bool
    group_size: int


CASES = [Case(f, s, g) for f in FORMATS for s in (True, False) for g in (32, -1)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.format}-{'sym' if c.symmetric else 'asym'}-{c.group_size}")
def test_dequantized_weights_keep_the_variance(case: Case, tmp_path: Path) -> None:
    synth.write(tiny("qwen2.5-7b", layers=1), tmp_path, **{**case._asdict(), "format": case.format})  # type: ignore[arg-type]
    found = tensors(tmp_path)
    for module, n, k in (("self_attn.k_proj", 64, 128), ("mlp.up_proj", 320, 128), ("mlp.down_proj", 128, 320)):
        w = dequantized(found, f"model.layers.0.{module}", case.format, case.group_size)
        assert tuple(w.shape) == (n, k)
        assert w.std() == pytest.approx(k**-0.5, rel=0.08)
        assert abs(w.mean()) < 0.06 * w.std()
        assert len(w[0].unique()) > 3
    bias = found["model.layers.0.self_attn.q_proj.bias"].float()
    assert bias.std() == pytest.approx(0.02, rel=0.4)
    assert found["lm_head.weight"].float().std() == pytest.approx(128**-0.5, rel=0.02)
    assert (found["model.norm.weight"] == 1).all()
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == case.format


def test_symmetric_values_have_mean_zero(tmp_path: Path) -> None:
    synth.write(tiny("llama-3.1-8b", layers=1, intermediate_size=4096), tmp_path)
    values = unpack_columns(tensors(tmp_path)["model.layers.0.mlp.up_proj.weight_packed"])
    counts = values.flatten().bincount(minlength=16) / values.numel()
    assert counts[0] == 0
    torch.testing.assert_close(counts, torch.tensor([0, *[1 / 16] * 7, 2 / 16, *[1 / 16] * 7]), atol=2e-3, rtol=0)


def test_gemma_norms_start_at_zero(tmp_path: Path) -> None:
    synth.write(tiny("gemma-3-1b"), tmp_path, group_size=64)
    assert all((v == 0).all() for k, v in tensors(tmp_path).items() if "norm" in k)  # Gemma multiplies by 1 + weight


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    config = tiny("qwen3-0.6b")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(name) + seed)  # the global generator must not matter
        synth.write(config, tmp_path / name, group_size=32, seed=seed)
    a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_shards_and_layers_do_not_change_a_tensor(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    whole = synth.write(
        tiny("llama-3.1-8b", layers=3),
        tmp_path / "whole",
        group_size=64,
        shard_bytes=100_000,
        progress=lambda d, t: seen.append((d, t)),
    )
    synth.write(tiny("llama-3.1-8b", layers=3), tmp_path / "cut", group_size=32, shard_bytes=100_000)
    synth.write(tiny("llama-3.1-8b", layers=1), tmp_path / "cut", group_size=64)  # over its own output
    index = json.loads((tmp_path / "whole/model.safetensors.index.json").read_text())
    files = {f.name for f in (tmp_path / "whole").glob("*.safetensors")}
    assert whole.shards == len(files) > 3
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == whole.nbytes
    assert seen == sorted(seen)
    assert seen[-1] == (whole.nbytes, whole.nbytes)
    for file in files:
        assert all(index["weight_map"][k] == file for k in load_file(tmp_path / "whole" / file))
    all_of_it, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert cut.keys() < all_of_it.keys()
    assert all(torch.equal(v, all_of_it[k]) for k, v in cut.items())
    assert not (tmp_path / "cut/model.safetensors.index.json").exists()


def test_experts_carry_their_published_names(tmp_path: Path) -> None:
    more = {"num_experts": 4, "moe_intermediate_size": 96}
    written = synth.write(tiny("qwen3-30b-a3b", layers=1, **more), tmp_path, group_size=32)
    found = tensors(tmp_path)
    assert written.quantized == 4 + 3 * 4
    assert tuple(found["model.layers.0.mlp.experts.3.gate_proj.weight_packed"].shape) == (96, 16)
    assert tuple(found["model.layers.0.mlp.experts.0.up_proj.weight_scale"].shape) == (96, 4)
    assert found["model.layers.0.mlp.experts.2.down_proj.weight_shape"].tolist() == [128, 96]
    assert tuple(found["model.layers.0.mlp.gate.weight"].shape) == (4, 128)
    ignore = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "re:.*mlp.gate$"]


def test_vision_tower_is_ignored(tmp_path: Path) -> None:
    ignores = {
        "compressed-tensors": ("ignore", ["lm_head", "re:.*visual.*"]),
        "gptq": ("dynamic", {"-:.*visual.*": {}}),
        "awq": ("modules_to_not_convert", ["lm_head", "visual"]),
    }
    for format, (key, value) in ignores.items():
        synth.write(tiny("qwen3-vl-2b", layers=1), tmp_path, group_size=32, format=format)  # type: ignore[arg-type]
        found = json.loads((tmp_path / "config.json").read_text())["quantization_config"][key]
        assert sorted(found) == sorted(value)


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        synth.write(tiny("qwen3-0.6b"), tmp_path, group_size=32)
    with pytest.raises(ConfigError, match="is a file"):
        synth.write(tiny("qwen3-0.6b"), tmp_path / "notes.txt", group_size=32)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_broken_off_output_is_no_checkpoint_and_may_be_rewritten(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    synth.write(tiny("qwen3-0.6b"), tmp_path, group_size=32)
    with pytest.raises(KeyboardInterrupt):
        synth.write(tiny("qwen3-0.6b"), tmp_path, group_size=32, shard_bytes=50_000, progress=stop)
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / synth.MARKER).exists()
    synth.write(tiny("qwen3-0.6b"), tmp_path, group_size=32)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", synth.MARKER}


class Refusal(NamedTuple):
    config: dict[str, Any]
    arguments: dict[str, Any]
    message: str


REFUSALS = [
    Refusal(tiny("llama-3.1-8b", intermediate_size=328), {}, r"mlp.down_proj has 328 .* group size 128 \(fit: -1\)"),
    Refusal(tiny("llama-3.1-8b", intermediate_size=324), {"group_size": -1, "format": "awq"}, "multiples of 8"),
    Refusal(tiny("llama-3.1-8b"), {"group_size": 12}, "group size 12"),
    Refusal(tiny("llama-3.1-8b"), {"format": "gguf"}, "unknown format 'gguf'; known: compressed-tensors, gptq, awq"),
    Refusal(tiny("llama-3.1-8b"), {"dtype": "float32"}, "float32"),
    Refusal(tiny("llama-3.1-8b"), {"seed": -1}, "seed=-1"),
    Refusal({"model_type": "nonesuch"}, {}, "nonesuch"),
    Refusal({**SMALL, "model_type": "mixtral", "num_key_value_heads": 2}, {"group_size": 32}, "experts"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.message[:12])
def test_refused_before_anything_is_written(refusal: Refusal, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=refusal.message):
        synth.write(refusal.config, tmp_path / "out", **refusal.arguments)
    assert not (tmp_path / "out").exists()


def test_full_disk_is_refused_with_the_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"takes 36\.\d+ GiB, 0\.00 GiB are free"):
        synth.write(preset("llama-3.3-70b"), tmp_path / "out")
