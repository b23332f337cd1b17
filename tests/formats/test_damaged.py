"""Damaged modules: the error's type, and file, tensor, expected and found in its message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
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


def read(directory: Path) -> None:
    """What an engine does with a module."""
    fmt = formats.detect(Checkpoint.open(directory))
    if fmt.is_quantized(NAME):
        fmt.check(NAME, (N, K))
        fmt.read(NAME, torch.float16)


Edit = Callable[[Tensors, str], object]


def drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def put(tensor: torch.Tensor) -> Edit:
    return lambda tensors, name: tensors.__setitem__(name, tensor)


def change(value: float, at: int = 3) -> Edit:
    return lambda tensors, name: tensors[name].view(-1).__setitem__(at, value)


def elsewhere(leaf: str, edit: Edit) -> Edit:
    """Edit another tensor than the one that the message names."""
    return lambda tensors, name: edit(tensors, f"{NAME}.{leaf}")


def case(**options: Any) -> QuantCase:
    return random_case(N, K, 32, **options)


SYM, ASYM, ORDERED = case(), case(symmetric=False), case(act_order=True)
ORDER = ORDERED.groups().to(torch.int32)
UNEVEN = torch.where(ORDER == 1, 0, ORDER)  # two groups in one
INTS = torch.zeros(2, 2, dtype=torch.int32)
NAN, INF = float("nan"), float("inf")
SCALE_DTYPES = "dtype float16 or bfloat16 or float32"
PRESENT, FINITE, BAD = "a tensor of that name", "finite scales", "1 that are NaN or infinite"

# format, module, leaf of the tensor that the message names, damage, expected, found
DAMAGES: list[tuple[Callable[..., None], QuantCase, str, Edit, str, str]] = [
    (CT, SYM, "weight_scale", drop, PRESENT, "none"),
    (CT, SYM, "weight_shape", drop, PRESENT, "none"),
    (CT, ASYM, "weight_zero_point", drop, PRESENT, "none"),
    (CT, ORDERED, "weight_g_idx", drop, PRESENT, "none"),
    (CT, SYM, "weight_packed", put(INTS), "shape [24, 16]", "[2, 2]"),
    (CT, SYM, "weight_packed", put(torch.zeros(N, 16)), "dtype int32", "float32"),
    (CT, SYM, "weight_packed", elsewhere("weight_shape", change(64, at=1)), "shape [24, 8]", "[24, 16]"),
    (CT, SYM, "weight_shape", change(0, at=1), "two sizes from 1 up", "[24, 0]"),
    (CT, SYM, "weight_scale", put(torch.ones(N, 3)), "shape [24, 4]", "[24, 3]"),
    (CT, SYM, "weight_scale", put(torch.ones(N, 4).int()), SCALE_DTYPES, "int32"),
    (CT, SYM, "weight_scale", change(NAN), FINITE, BAD),
    (CT, SYM, "weight_zero_point", put(INTS), "none (symmetric)", "the tensor"),
    (CT, SYM, "weight_g_idx", put(ORDER), "none (actorder is not group)", "the tensor"),
    (CT, ORDERED, "weight_g_idx", change(4), "groups 0..3", "0..4"),
    (CT, ORDERED, "weight_g_idx", change(-1), "groups 0..3", "-1..3"),
    (CT, ORDERED, "weight_g_idx", put(UNEVEN), "32 columns in each group", "64 in group 0"),
    (GPTQ, SYM, "scales", drop, PRESENT, "none"),
    (GPTQ, ASYM, "qzeros", drop, PRESENT, "none"),
    (GPTQ, ORDERED, "g_idx", drop, PRESENT, "none"),
    (GPTQ, SYM, "qweight", put(INTS), "shape [16, 24]", "[2, 2]"),
    (GPTQ, SYM, "qweight", put(INTS[0]), "shape [16, 24]", "[2]"),
    (GPTQ, ASYM, "qzeros", put(INTS), "shape [4, 3]", "[2, 2]"),
    (GPTQ, SYM, "scales", change(INF), FINITE, BAD),
    (GPTQ, ORDERED, "g_idx", change(99), "groups 0..3", "0..99"),
    (GPTQ, SYM, "g_idx", put(ORDER), "groups in order, k // 32 (desc_act: false)", "another order"),
    (GPTQ, SYM, "qzeros", change(0x77777776), "stored zero points all 7 or all 8 (sym: true)", "6..7"),
    (AWQ, ASYM, "scales", drop, PRESENT, "none"),
    (AWQ, ASYM, "qzeros", drop, PRESENT, "none"),
    (AWQ, ASYM, "qweight", put(INTS), "shape [128, 3]", "[2, 2]"),
    (AWQ, ASYM, "scales", put(torch.ones(4, 8)), "shape [4, 24]", "[4, 8]"),
    (AWQ, ASYM, "scales", change(NAN), FINITE, BAD),
    (AWQ, SYM, "qzeros", put(torch.zeros(4, 3, dtype=torch.int32)), "zero points all 8 (zero_point: false)", "0..0"),
]


@pytest.mark.parametrize(("write", "plain", "leaf", "damage", "expected", "found"), DAMAGES)
def test_damage(
    write: Callable[..., None], plain: QuantCase, leaf: str, damage: Edit, expected: str, found: str, tmp_path: Path
) -> None:
    write(tmp_path, {}, {NAME: plain})
    read(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors, f"{NAME}.{leaf}")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    where = f"file {tmp_path / 'model.safetensors'}, tensor {NAME}.{leaf}"
    assert str(error.value) == f"{where}: expected {expected}, found {found}"


@pytest.mark.parametrize("write", [CT, GPTQ, AWQ])
def test_group_size_that_does_not_divide_k(write: Callable[..., None], tmp_path: Path) -> None:
    write(tmp_path, {}, {NAME: random_case(N, 96, 32, symmetric=False)})
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config["quantization_config"]
    place = quantization["config_groups"]["group_0"]["weights"] if write is CT else quantization
    place["group_size"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    fmt = formats.detect(Checkpoint.open(tmp_path))
    with pytest.raises(UnsupportedError) as error:
        fmt.check(NAME, (N, 96))
    leaf = "weight_packed" if write is CT else "qweight"
    where = f"file {tmp_path / 'model.safetensors'}, tensor {NAME}.{leaf}"
    assert str(error.value) == f"{where}: expected K a multiple of the group size 128, found K = 96"


def test_another_shape_than_the_model_wants(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, {}, {NAME: SYM})
    with pytest.raises(CheckpointError, match=r"tensor model.*weight_packed: expected shape \[48, 16\], found \[24, 16\]"):
        formats.detect(Checkpoint.open(tmp_path)).check(NAME, (48, K))


def test_a_vector_for_a_matrix(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {NAME: SYM})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {f"{NAME}.qweight": INTS[0]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"qweight: expected a matrix of two sizes from 1 up, found \[2\]"):
        formats.detect(Checkpoint.open(tmp_path)).shape(NAME)


def test_scales_too_large_for_the_dtype(tmp_path: Path) -> None:
    plain = case(dtype=torch.bfloat16)
    write_gptq(tmp_path, {}, {NAME: replace(plain, scales=plain.scales * 1e10)})
    with pytest.raises(UnsupportedError, match=r"scales: expected scales that fit torch\.float16, found up to"):
        read(tmp_path)


def test_gptq_v1_zero_points_that_nothing_can_read(tmp_path: Path) -> None:
    write_gptq(tmp_path, {}, {NAME: ASYM}, quantization={"meta": {"quantizer": "auto_gptq:0.7.1"}})
    with pytest.raises(CheckpointError, match=r"qzeros: expected zero points 1\.\.15 .*, found a stored 15"):
        read(tmp_path)
