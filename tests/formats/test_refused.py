"""Configs out of scope or malformed: the error's type, and file, expected and found in its message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.formats.writers import random_case, write_awq, write_compressed_tensors, write_gptq
from twinweight import formats
from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError, UnsupportedError

NAME = "model.layers.0.mlp.up_proj"
CT, GPTQ, AWQ = write_compressed_tensors, write_gptq, write_awq
ASYM = random_case(24, 128, 32, symmetric=False)


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


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
        formats.detect(Checkpoint.open(tmp_path))
    message = str(error.value)
    assert message.startswith(f"file {tmp_path / 'config.json'}: expected {expected}")
    assert found in message.partition(", found ")[2]


MALFORMED: list[tuple[Callable[..., None], Callable[[dict[str, Any]], object], str]] = [
    (CT, top(config_groups={}), "config_groups: one group or more"),
    (CT, top(ignore="lm_head"), "ignore: a list of names"),
    (CT, top(ignore=["re:("]), "ignore: a regular expression"),
    (CT, weights(symmetric="yes"), "symmetric: true or false"),
    (GPTQ, top(bits="four"), "bits: a whole number"),
    (GPTQ, top(group_size=None), "group_size: a whole number"),
    (GPTQ, top(dynamic=["+:.*"]), "dynamic: an object"),
    (GPTQ, top(meta="gptqmodel"), "meta: an object"),
    (CT, top(sparsity_config="dense"), "sparsity_config: an object"),
    (CT, top(transform_config=[1]), "transform_config: an object"),
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
        formats.detect(Checkpoint.open(tmp_path))
    assert str(error.value).startswith(f"file {tmp_path / 'config.json'}: expected {expected}")


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {NAME: ASYM})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"file /.*/config\.json: expected a quantization_config .*, found none"):
        formats.detect(Checkpoint.open(tmp_path))
