"""Which modules are int4: ignore lists, patterns, several groups, negative rules, the head; and config against file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.writers import QuantCase, random_case, write_awq, write_compressed_tensors, write_gptq
from twinweight import formats
from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError

Q, GATE, UP, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "lm_head"
VISUAL = "model.visual.blocks.0.attn.qkv"


def case(group_size: int | None = 32, **options: Any) -> QuantCase:
    return random_case(16, 128, group_size, **options)


def dense(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.zeros(16, 128, dtype=torch.bfloat16) for name in names}


def opened(path: Path) -> formats.Format:
    return formats.detect(Checkpoint.open(path))


@pytest.mark.parametrize("ignore", [[VISUAL, HEAD, GATE], ["re:.*visual.*", "lm_head", "re:.*mlp\\.gate$"]])
def test_compressed_tensors_ignore(ignore: list[str], tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, {}, {Q: case(), UP: case()}, dense(VISUAL, HEAD, GATE), quantization={"ignore": ignore})
    fmt = opened(tmp_path)
    assert [fmt.is_quantized(n) for n in (Q, UP, VISUAL, HEAD, GATE)] == [True, True, False, False, False]


def test_compressed_tensors_groups_by_name_pattern_and_class(tmp_path: Path) -> None:
    modules = {Q: case(64), UP: case(None, symmetric=False), "model.layers.1.mlp.down_proj": case(128)}
    write_compressed_tensors(tmp_path, {}, modules)
    config = Checkpoint.open(tmp_path).config["quantization_config"]
    groups = config["config_groups"]
    groups["group_0"]["targets"], groups["group_1"]["targets"], groups["group_2"]["targets"] = ["Linear"], [UP], ["re:.*mlp.*"]
    write_compressed_tensors(tmp_path, {}, modules, quantization={"config_groups": groups})
    fmt = opened(tmp_path)
    for name, expected in modules.items():
        assert fmt.check(name, (16, 128)).group_size == (expected.group_size or 128)
        assert torch.equal(fmt.read(name, torch.bfloat16).dequantize(), expected.dense())


def test_compressed_tensors_preset(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, {}, {Q: case(128)}, quantization={"config_groups": {"W4A16": ["Linear"]}})
    assert opened(tmp_path).check(Q, (16, 128)).group_size == 128


@pytest.mark.parametrize("actorder", ["weight", "static", False, None])
def test_compressed_tensors_actorder_without_g_idx(actorder: object, tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, {}, {Q: case()})
    groups = Checkpoint.open(tmp_path).config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["actorder"] = actorder
    write_compressed_tensors(tmp_path, {}, {Q: case()}, quantization={"config_groups": groups})
    assert opened(tmp_path).read(Q, torch.bfloat16).g_idx is None


def test_gptq_dynamic_rules(tmp_path: Path) -> None:
    rules = {"-:.*visual.*": {}, r"+:.*gate_proj": {"group_size": 64, "desc_act": True}, r".*q_proj": {"group_size": -1}}
    modules = {Q: case(None), UP: case(64, act_order=True), "model.layers.0.mlp.up_proj": case(32)}
    write_gptq(tmp_path, {}, modules, dense(VISUAL, GATE), quantization={"dynamic": rules, "group_size": 32, "desc_act": False})
    fmt = opened(tmp_path)
    assert not fmt.is_quantized(VISUAL)
    assert not fmt.is_quantized(GATE)  # not in the config at all: the file decides
    for name, expected in modules.items():
        assert fmt.is_quantized(name)
        assert torch.equal(fmt.read(name, torch.bfloat16).dequantize(), expected.dense())


def test_gptq_quantized_head(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {HEAD: case()})
    assert opened(tmp_path).is_quantized(HEAD)


def test_awq_modules_to_not_convert(tmp_path: Path) -> None:
    listed = {"modules_to_not_convert": ["visual", "gate"]}
    modules = {Q: case(symmetric=False), UP: case(symmetric=False)}
    write_awq(tmp_path, {}, modules, dense(VISUAL, GATE, HEAD), quantization=listed)
    fmt = opened(tmp_path)
    assert [fmt.is_quantized(n) for n in (Q, UP, VISUAL, GATE, HEAD)] == [True, True, False, False, False]


@pytest.mark.parametrize("write", [write_compressed_tensors, write_gptq, write_awq])
def test_a_tied_head_need_not_be_stored(write: Any, tmp_path: Path) -> None:
    write(tmp_path, {"tie_word_embeddings": True}, {Q: case(symmetric=False)})
    assert not opened(tmp_path).is_quantized(HEAD)


MISMATCHES: dict[str, tuple[Any, dict[str, QuantCase], tuple[str, ...], dict[str, Any], str]] = {
    "compressed-tensors, dense though targeted": (write_compressed_tensors, {UP: case()}, (Q,), {"ignore": []}, f"{Q}.weight"),
    "compressed-tensors, int4 though ignored": (
        write_compressed_tensors,
        {Q: case()},
        (),
        {"ignore": [Q]},
        f"{Q}.weight_packed",
    ),
    "compressed-tensors, targeted and absent": (write_compressed_tensors, {UP: case()}, (), {}, f"{Q}.weight_packed"),
    "compressed-tensors, stored twice": (write_compressed_tensors, {Q: case()}, (Q,), {"ignore": []}, f"{Q}.weight"),
    "gptq, int4 though excluded": (write_gptq, {Q: case()}, (), {"dynamic": {"-:.*q_proj": {}}}, f"{Q}.qweight"),
    "gptq, absent": (write_gptq, {UP: case()}, (), {}, f"{Q}.qweight"),
    "gptq, stored twice": (write_gptq, {Q: case()}, (Q,), {}, f"{Q}.weight"),
    "awq, int4 though excluded": (
        write_awq,
        {Q: case(symmetric=False)},
        (),
        {"modules_to_not_convert": ["self_attn"]},
        f"{Q}.qweight",
    ),
    "awq, absent": (write_awq, {UP: case(symmetric=False)}, (), {}, f"{Q}.qweight"),
}


@pytest.mark.parametrize("key", MISMATCHES)
def test_config_and_file_disagree(key: str, tmp_path: Path) -> None:
    write, modules, plain, quantization, tensor = MISMATCHES[key]
    write(tmp_path, {}, modules, dense(*plain), quantization=quantization)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path).is_quantized(Q)
    assert f"file {tmp_path / 'model.safetensors'}, tensor {tensor}: expected " in str(error.value)
    assert ", found " in str(error.value)


def test_gptq_head_against_the_config(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {HEAD: case()}, quantization={"lm_head": False})
    with pytest.raises(CheckpointError, match=r"lm_head\.qweight: expected lm_head\.weight"):
        opened(tmp_path).is_quantized(HEAD)
