"""Damaged checkpoints and those out of scope: the error's type, and file, tensor, expected and found in its message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.writers import QuantCase, random_case, write_awq, write_compressed_tensors, write_gptq
from twinweight import formats
from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError, UnsupportedError

NAME = "model.layers.0.mlp.up_proj"
N, K = 24, 128
CT, GPTQ, AWQ = write_compressed_tensors, write_gptq, write_awq
Tensors = dict[str, torch.Tensor]


def edit_tensors(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def read(directory: Path) -> None:
    """What an engine does with a module."""
    fmt = formats.detect(Checkpoint.open(directory))
    if fmt.is_quantized(NAME):
        fmt.check(NAME, (N, K))
        fmt.read(NAME, torch.float16)


def case(**options: Any) -> QuantCase:
    return random_case(N, K, 32, **options)


@dataclass(frozen=True)
class Damage:
    """leaf: of the tensor that the message must name. message: "expected ..., found ..."."""

    write: Callable[..., None]
    plain: QuantCase
    leaf: str
    edit: Callable[[Tensors], object]
    message: str
    error: type[CheckpointError] = CheckpointError


def put(leaf: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(f"{NAME}.{leaf}", tensor)


def drop(leaf: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{NAME}.{leaf}")


def change(leaf: str, value: float, at: int = 3) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{NAME}.{leaf}"].view(-1).__setitem__(at, value)


SYM, ASYM, ORDERED = case(), case(symmetric=False), case(act_order=True)
INTS = torch.zeros(2, 2, dtype=torch.int32)
BAD_ORDER = ORDERED.g_idx.clone()  # type: ignore[union-attr]
BAD_ORDER[BAD_ORDER == 1] = 0

DAMAGES = {
    "ct missing scale": Damage(CT, SYM, "weight_scale", drop("weight_scale"), "expected a tensor of that name, found none"),
    "ct missing shape": Damage(CT, SYM, "weight_shape", drop("weight_shape"), "expected a tensor of that name, found none"),
    "ct missing zeros": Damage(CT, ASYM, "weight_zero_point", drop("weight_zero_point"), "expected a tensor of that name, found none"),
    "ct missing g_idx": Damage(CT, ORDERED, "weight_g_idx", drop("weight_g_idx"), "expected a tensor of that name, found none"),
    "ct packed shape": Damage(CT, SYM, "weight_packed", put("weight_packed", INTS), "expected shape [24, 16], found [2, 2]"),
    "ct packed dtype": Damage(CT, SYM, "weight_packed", put("weight_packed", torch.zeros(N, 16)), "expected dtype int32, found float32"),
    "ct scale shape": Damage(CT, SYM, "weight_scale", put("weight_scale", torch.ones(N, 3)), "expected shape [24, 4], found [24, 3]"),
    "ct scale dtype": Damage(CT, SYM, "weight_scale", put("weight_scale", torch.ones(N, 4).int()), "expected dtype float16 or bfloat16 or float32, found int32"),
    "ct other shape": Damage(CT, SYM, "weight_packed", change("weight_shape", 64, at=1), "expected shape [24, 8], found [24, 16]"),
    "ct no shape": Damage(CT, SYM, "weight_shape", change("weight_shape", 0, at=1), "expected two sizes from 1 up, found [24, 0]"),
    "ct NaN": Damage(CT, SYM, "weight_scale", change("weight_scale", float("nan")), "expected finite scales, found 1 that are NaN or infinite"),
    "ct zeros though symmetric": Damage(CT, SYM, "weight_zero_point", put("weight_zero_point", INTS), "expected none (symmetric), found the tensor"),
    "ct g_idx range": Damage(CT, ORDERED, "weight_g_idx", change("weight_g_idx", 4), "expected groups 0..3, found 0..4"),
    "ct g_idx negative": Damage(CT, ORDERED, "weight_g_idx", change("weight_g_idx", -1), "expected groups 0..3, found -1..3"),
    "ct g_idx counts": Damage(CT, ORDERED, "weight_g_idx", put("weight_g_idx", BAD_ORDER), "expected 32 columns in each group, found 64 in group 0"),
    "gptq missing scales": Damage(GPTQ, SYM, "scales", drop("scales"), "expected a tensor of that name, found none"),
    "gptq missing zeros": Damage(GPTQ, ASYM, "qzeros", drop("qzeros"), "expected a tensor of that name, found none"),
    "gptq missing g_idx": Damage(GPTQ, ORDERED, "g_idx", drop("g_idx"), "expected a tensor of that name, found none"),
    "gptq qweight shape": Damage(GPTQ, SYM, "qweight", put("qweight", INTS), "expected shape [16, 24], found [2, 2]"),
    "gptq qzeros shape": Damage(GPTQ, ASYM, "qzeros", put("qzeros", INTS), "expected shape [4, 3], found [2, 2]"),
    "gptq inf": Damage(GPTQ, SYM, "scales", change("scales", float("inf")), "expected finite scales, found 1 that are NaN or infinite"),
    "gptq g_idx range": Damage(GPTQ, ORDERED, "g_idx", change("g_idx", 99), "expected groups 0..3, found 0..99"),
    "gptq unexpected order": Damage(GPTQ, SYM, "g_idx", put("g_idx", ORDERED.g_idx), "expected groups in order, k // 32 (desc_act: false), found another order"),
    "gptq zeros though symmetric": Damage(GPTQ, SYM, "qzeros", change("qzeros", 0x77777776), "expected stored zero points all 7 or all 8 (sym: true), found 6..7"),
    "awq missing scales": Damage(AWQ, ASYM, "scales", drop("scales"), "expected a tensor of that name, found none"),
    "awq missing zeros": Damage(AWQ, ASYM, "qzeros", drop("qzeros"), "expected a tensor of that name, found none"),
    "awq qweight shape": Damage(AWQ, ASYM, "qweight", put("qweight", torch.zeros(64, 3, dtype=torch.int32)), "expected shape [4, 24], found"),
    "awq scales shape": Damage(AWQ, ASYM, "scales", put("scales", torch.ones(4, 8)), "expected shape [4, 24], found [4, 8]"),
    "awq NaN": Damage(AWQ, ASYM, "scales", change("scales", float("nan")), "expected finite scales, found 1 that are NaN or infinite"),
    "awq zeros though symmetric": Damage(AWQ, SYM, "qzeros", put("qzeros", torch.zeros(4, 3, dtype=torch.int32)), "expected zero points all 8 (zero_point: false), found 0..0"),
}  # fmt: skip


@pytest.mark.parametrize("key", DAMAGES)
def test_damage(key: str, tmp_path: Path) -> None:
    damage = DAMAGES[key]
    damage.write(tmp_path, {}, {NAME: damage.plain})
    read(tmp_path)
    edit_tensors(tmp_path, damage.edit)
    with pytest.raises(damage.error) as error:
        read(tmp_path)
    message = str(error.value)
    if key == "awq qweight shape":  # K = 64 by itself; the scales are checked first, against the engine's K
        assert (
            message
            == "file model.safetensors, tensor model.layers.0.mlp.up_proj.qweight: expected shape [128, 3], found [64, 3]"
        )
    else:
        assert message == f"file model.safetensors, tensor {NAME}.{damage.leaf}: {damage.message}"


@pytest.mark.parametrize("write", [CT, GPTQ, AWQ])
def test_group_size_that_does_not_divide_k(write: Callable[..., None], tmp_path: Path) -> None:
    write(tmp_path, {}, {NAME: random_case(N, 96, 32, symmetric=False)})
    edit_config(tmp_path, set_group_size_128)
    fmt = formats.detect(Checkpoint.open(tmp_path))
    with pytest.raises(UnsupportedError) as error:
        fmt.check(NAME, (N, 96))
    leaf = "weight_packed" if write is CT else "qweight"
    expected = f"file model.safetensors, tensor {NAME}.{leaf}: expected K a multiple of the group size 128, found K = 96"
    assert str(error.value) == expected


def set_group_size_128(config: dict[str, Any]) -> None:
    place = config["config_groups"]["group_0"]["weights"] if "config_groups" in config else config
    place["group_size"] = 128


def test_another_shape_than_the_model_wants(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, {}, {NAME: SYM})
    with pytest.raises(CheckpointError, match=r"tensor model.*weight_packed: expected shape \[48, 16\], found \[24, 16\]"):
        formats.detect(Checkpoint.open(tmp_path)).check(NAME, (48, K))


def test_scales_too_large_for_the_dtype(tmp_path: Path) -> None:
    plain = case(dtype=torch.bfloat16)
    write_gptq(tmp_path, {}, {NAME: replace(plain, scales=plain.scales * 1e10)})
    with pytest.raises(UnsupportedError, match=r"scales: expected scales that fit torch\.float16, found up to"):
        read(tmp_path)


def test_gptq_v1_zero_points_that_nothing_can_read(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {NAME: ASYM}, quantization={"meta": {"quantizer": "auto_gptq:0.7.1"}})
    with pytest.raises(CheckpointError, match=r"qzeros: expected zero points 1\.\.15 .*, found a stored 15"):
        read(tmp_path)


def weights(**entries: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(entries)


def group(**entries: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["config_groups"]["group_0"].update(entries)


def top(**entries: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config.update(entries)


INT8 = {"num_bits": 8, "type": "int", "dynamic": True}
REFUSED: list[tuple[Callable[..., None], Callable[[dict[str, Any]], object], str, str]] = [
    (CT, weights(num_bits=8), "config_groups.group_0.weights.num_bits: 4", "8"),
    (CT, weights(num_bits=3), "config_groups.group_0.weights.num_bits: 4", "3"),
    (CT, weights(type="float"), "config_groups.group_0.weights.type: 'int'", "'float'"),
    (CT, weights(dynamic=True), "config_groups.group_0.weights.dynamic: False", "True"),
    (CT, weights(strategy="tensor", group_size=None), "config_groups.group_0.weights.strategy: ", "tensor"),
    (CT, weights(strategy="block", block_structure=[128, 128]), "config_groups.group_0.weights.block_structure: None", "128"),
    (CT, weights(group_size=48), "config_groups.group_0.weights.group_size: 32, 64, 128", "48"),
    (CT, weights(actorder="random"), "config_groups.group_0.weights.actorder: ", "'random'"),
    (CT, group(input_activations=INT8), "config_groups.group_0.input_activations: none", "8"),
    (CT, group(output_activations=INT8), "config_groups.group_0.output_activations: none", "8"),
    (CT, group(format="int-quantized"), "config_groups.group_0.format: pack-quantized", "'int-quantized'"),
    (CT, top(format="marlin-24"), "config_groups.group_0.format: pack-quantized", "'marlin-24'"),
    (CT, top(kv_cache_scheme=INT8), "kv_cache_scheme: none", "8"),
    (CT, top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format: dense", "'sparse-24-bitmask'"),
    (CT, top(transform_config={"config_groups": {"R1": {}}}), "transform_config: none", "R1"),
    (CT, top(config_groups={"FP8": ["Linear"]}), "config_groups.FP8: a preset", "'FP8'"),
    (CT, top(quant_method="fp8"), "quant_method: one of compressed-tensors, gptq, awq", "'fp8'"),
    (GPTQ, top(bits=8), "bits: 4", "8"),
    (GPTQ, top(bits=3), "bits: 4", "3"),
    (GPTQ, top(group_size=1024), "group_size: 32, 64, 128", "1024"),
    (GPTQ, top(checkpoint_format="marlin"), "checkpoint_format: gptq or gptq_v2", "'marlin'"),
    (GPTQ, top(is_marlin_format=True), "checkpoint_format: gptq or gptq_v2", "'marlin'"),
    (GPTQ, top(pack_dtype="int8"), "pack_dtype: int32", "'int8'"),
    (GPTQ, top(adapter={"name": "lora"}), "adapter: none", "lora"),
    (GPTQ, top(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic['+:.*down.*'].bits: 4", "8"),
    (AWQ, top(bits=8), "bits: 4", "8"),
    (AWQ, top(version="gemv"), "version: gemm", "'gemv'"),
    (AWQ, top(version="marlin"), "version: gemm", "'marlin'"),
    (AWQ, top(backend="llm-awq"), "backend: autoawq", "'llm-awq'"),
    (AWQ, top(group_size=16), "group_size: 32, 64, 128", "16"),
]


@pytest.mark.parametrize(("write", "edit", "expected", "found"), REFUSED)
def test_out_of_scope(
    write: Callable[..., None], edit: Callable[[dict[str, Any]], object], expected: str, found: str, tmp_path: Path
) -> None:
    write(tmp_path, {}, {NAME: ASYM})
    edit_config(tmp_path, edit)
    with pytest.raises(UnsupportedError) as error:
        read(tmp_path)
    message = str(error.value)
    assert message.startswith(f"file config.json: expected {expected}")
    assert found in message.partition(", found ")[2]


MALFORMED: list[tuple[Callable[..., None], Callable[[dict[str, Any]], object], str]] = [
    (CT, top(config_groups={}), "config_groups: one group or more"),
    (CT, top(ignore="lm_head"), "ignore: a list of names"),
    (CT, top(ignore=["re:("]), "ignore: a regular expression"),
    (CT, weights(symmetric="yes"), "symmetric: true or false"),
    (GPTQ, top(bits="four"), "bits: a whole number"),
    (GPTQ, top(group_size=None), "group_size: a whole number"),
    (GPTQ, top(dynamic={"-:(": {}}), r"dynamic['-:(']: a regular expression"),
    (AWQ, top(modules_to_not_convert=[1]), "modules_to_not_convert: a list of names"),
]


@pytest.mark.parametrize(("write", "edit", "expected"), MALFORMED)
def test_malformed_config(
    write: Callable[..., None], edit: Callable[[dict[str, Any]], object], expected: str, tmp_path: Path
) -> None:
    write(tmp_path, {}, {NAME: ASYM})
    edit_config(tmp_path, edit)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"file config.json: expected {expected}")


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {NAME: SYM})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"file config\.json: expected a quantization_config .*, found none"):
        read(tmp_path)
