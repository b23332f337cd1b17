"""Every format against its own packing: integers, scales, zero points and the dense weight must come back exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.writers import (
    QuantCase,
    compressed_tensors_scheme,
    pack_compressed_tensors,
    random_case,
    write_awq,
    write_compressed_tensors,
    write_gptq,
)
from twinweight import formats
from twinweight.checkpoint import Checkpoint

NAME = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Case:
    format: str
    n: int
    k: int
    group_size: int | None
    symmetric: bool = True
    act_order: bool = False
    v2: bool = False


CASES = [
    Case("compressed-tensors", 1, 32, 32),
    Case("compressed-tensors", 3, 5, None),
    Case("compressed-tensors", 17, 1001, None, symmetric=False),
    Case("compressed-tensors", 100, 96, 32),
    Case("compressed-tensors", 77, 320, 64, symmetric=False),
    Case("compressed-tensors", 64, 384, 128),
    Case("compressed-tensors", 33, 256, 128, symmetric=False),
    Case("compressed-tensors", 50, 160, 32, act_order=True),
    Case("compressed-tensors", 41, 192, 64, symmetric=False, act_order=True),
    Case("gptq", 1, 32, 32),
    Case("gptq", 5, 13, None, symmetric=False),
    Case("gptq", 24, 96, 32),
    Case("gptq", 100, 320, 64, symmetric=False),
    Case("gptq", 72, 384, 128, symmetric=False, v2=True),
    Case("gptq", 56, 256, 128, v2=True),
    Case("gptq", 40, 160, 32, act_order=True),
    Case("gptq", 43, 192, 64, symmetric=False, act_order=True),
    Case("gptq", 48, 128, 32, symmetric=False, act_order=True, v2=True),
    Case("gptq", 64, 104, None, act_order=True),
    Case("awq", 8, 32, 32, symmetric=False),
    Case("awq", 24, 96, 32, symmetric=False),
    Case("awq", 104, 320, 64, symmetric=False),
    Case("awq", 72, 384, 128, symmetric=False),
    Case("awq", 40, 77, None, symmetric=False),
    Case("awq", 16, 160, 32),
    Case("awq", 8, 1, None),
]
DTYPES = [torch.float16, torch.bfloat16]
WRITERS: dict[str, Callable[..., None]] = {
    "compressed-tensors": write_compressed_tensors,
    "gptq": write_gptq,
    "awq": write_awq,
}


def draw(case: Case, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> QuantCase:
    return random_case(
        case.n, case.k, case.group_size, symmetric=case.symmetric, act_order=case.act_order, dtype=dtype, bias=True, seed=seed
    )


def write(case: Case, directory: Path, modules: dict[str, QuantCase], **options: Any) -> formats.Format:
    if case.v2:
        options["v2"] = True
    WRITERS[case.format](directory, {"model_type": "llama"}, modules, {"model.norm.weight": torch.ones(4)}, **options)
    return formats.detect(Checkpoint.open(directory))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_read_gives_back_what_was_packed(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = draw(case, dtype)
    fmt = write(case, tmp_path, {NAME: plain})
    assert fmt.name == case.format
    assert fmt.is_quantized(NAME)
    assert fmt.shape(NAME) == (case.n, case.k)
    kind = fmt.check(NAME, (case.n, case.k))
    weight = fmt.read(NAME, dtype)
    assert kind.group_size == weight.group_size == (case.group_size or case.k)
    assert kind.symmetric == (weight.zeros is None) == case.symmetric
    assert kind.act_order == (weight.g_idx is not None) == (case.act_order and case.group_size is not None)
    assert weight.shape == (case.n, case.k)
    assert torch.equal(weight.values(), plain.values)
    assert weight.scales.dtype == dtype
    assert torch.equal(weight.scales, plain.scales)
    if plain.zeros is not None:
        assert weight.zeros is not None
        assert torch.equal(weight.zeros, plain.zeros)
    assert torch.equal(weight.dequantize(), plain.dense())
    assert weight.packed.is_contiguous()
    assert weight.scales.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.format == "compressed-tensors" and not c.act_order], ids=str)
def test_compressed_tensors_decompresses_to_the_same_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    plain = draw(case, dtype)
    fmt = write(case, tmp_path, {NAME: plain})
    oracle = PackedQuantizationCompressor.decompress(pack_compressed_tensors(plain), compressed_tensors_scheme(plain))["weight"]
    assert oracle.dtype == dtype
    assert torch.equal(fmt.read(NAME, dtype).dequantize(), oracle)


@pytest.mark.parametrize("format", WRITERS)
def test_scales_are_rounded_once_to_the_dtype_asked_for(format: str, tmp_path: Path) -> None:
    case = Case(format, 16, 64, 32, symmetric=False)
    plain = draw(case, torch.float16)
    assert torch.equal(write(case, tmp_path, {NAME: plain}).read(NAME, torch.bfloat16).scales, plain.scales.to(torch.bfloat16))


@pytest.mark.parametrize("format", WRITERS)
def test_owned_tensors_are_all_but_the_bias(format: str, tmp_path: Path) -> None:
    fmt = write(case := Case(format, 16, 64, 32, symmetric=False), tmp_path, {NAME: draw(case)}, shards=3)
    owned = set(fmt.owned_tensors(NAME))
    assert owned == {n for n in fmt.ckpt.names() if n.startswith(NAME)} - {f"{NAME}.bias"}
    assert torch.equal(fmt.ckpt.read(f"{NAME}.bias"), draw(case).bias)


def test_packed_words_of_compressed_tensors_are_not_copied(tmp_path: Path) -> None:
    case = Case("compressed-tensors", 256, 1024, 128)
    fmt = write(case, tmp_path, {NAME: draw(case)})
    packed = fmt.read(NAME, torch.bfloat16).packed
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    addresses = [line.split()[0].split("-") for line in maps.read_text().splitlines() if "model.safetensors" in line]
    assert any(int(low, 16) <= packed.data_ptr() < int(high, 16) for low, high in addresses)


@pytest.mark.parametrize("version", ["gptqmodel:5.0.0", "auto_gptq:0.7.1"])
def test_gptq_v1_zero_points_1_to_15_do_not_depend_on_the_writer(version: str, tmp_path: Path) -> None:
    case = Case("gptq", 40, 96, 32, symmetric=False)
    plain = draw(case)
    assert plain.zeros is not None
    plain.zeros.clamp_(min=1)
    weight = write(case, tmp_path, {NAME: plain}, quantization={"meta": {"quantizer": version}}).read(NAME, torch.bfloat16)
    assert weight.zeros is not None
    assert torch.equal(weight.zeros, plain.zeros)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_symmetric_gptq_is_read_whatever_the_version_label(v2: bool, label: str, tmp_path: Path) -> None:
    case = Case("gptq", 16, 64, 32, v2=v2)
    plain = draw(case)
    weight = write(case, tmp_path, {NAME: plain}, quantization={"checkpoint_format": label}).read(NAME, torch.bfloat16)
    assert torch.equal(weight.dequantize(), plain.dense())


def test_old_gptq_config_file_and_names(tmp_path: Path) -> None:
    case = Case("gptq", 16, 64, 32)
    plain = draw(case)
    write(case, tmp_path, {NAME: plain})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    fmt = formats.detect(Checkpoint.open(tmp_path))
    assert fmt.name == "gptq"
    assert torch.equal(fmt.read(NAME, torch.bfloat16).dequantize(), plain.dense())


def test_config_nested_under_text_config(tmp_path: Path) -> None:
    import json

    case = Case("awq", 16, 64, 32, symmetric=False)
    write(case, tmp_path, {NAME: draw(case)})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert formats.detect(Checkpoint.open(tmp_path)).is_quantized(NAME)
