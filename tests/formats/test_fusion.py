"""Fused modules out of split checkpoints and the reverse: rows must be those of a plain concatenation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.writers import QuantCase, random_case, write_awq, write_compressed_tensors, write_gptq
from twinweight import formats
from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError, UnsupportedError
from twinweight.formats import fusion
from twinweight.formats.fusion import Part, resolve

WRITERS = [write_compressed_tensors, write_gptq, write_awq]
ROWS = {"q_proj": 48, "k_proj": 16, "v_proj": 24}
K = 96


def part(name: str, seed: int, **options: Any) -> QuantCase:
    return random_case(ROWS[name], K, 32, bias=True, seed=seed, **options)


def join(cases: list[QuantCase]) -> QuantCase:
    zeros = [c.zeros for c in cases if c.zeros is not None]
    return replace(
        cases[0],
        values=torch.cat([c.values for c in cases]),
        scales=torch.cat([c.scales for c in cases]),
        zeros=torch.cat(zeros) if zeros else None,
        bias=torch.cat([c.bias for c in cases if c.bias is not None]),
    )


def opened(path: Path) -> formats.Format:
    return formats.detect(Checkpoint.open(path))


def parts_of(fmt: formats.Format, name: str, shapes: dict[str, tuple[int, int]]) -> tuple[Part, ...]:
    return resolve(name, shapes, lambda module: fusion.stored_shape(fmt, module), fmt.ckpt.source)


def test_resolve_is_pure() -> None:
    shapes = {"a.qkv_proj": (88, K), "a.o_proj": (K, K)}
    stored = {"a.q_proj": (48, K), "a.k_proj": (16, K), "a.v_proj": (24, K), "a.o_proj": (K, K)}
    assert resolve("a.o_proj", shapes, stored.get) == (Part("a.o_proj", 0, K, (K, K)),)
    assert [(p.name, p.start, p.stop) for p in resolve("a.qkv_proj", shapes, stored.get)] == [
        ("a.q_proj", 0, 48),
        ("a.k_proj", 0, 16),
        ("a.v_proj", 0, 24),
    ]
    split = resolve("a.k_proj", stored, shapes.get)
    assert split == (Part("a.qkv_proj", 48, 64, (88, K)),)
    assert resolve("up_proj", {"gate_proj": (8, 4), "up_proj": (8, 4)}, {"gate_up_proj": (16, 4)}.get)[0].start == 8


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_split_checkpoint_fused_model(write: Callable[..., None], symmetric: bool, tmp_path: Path) -> None:
    cases = {name: part(name, i, symmetric=symmetric) for i, name in enumerate(ROWS)}
    write(tmp_path, {}, {f"x.{name}": c for name, c in cases.items()})
    fmt = opened(tmp_path)
    parts = parts_of(fmt, "x.qkv_proj", {"x.qkv_proj": (88, K)})
    assert fusion.is_int4(fmt, parts)
    assert fusion.check_int4(fmt, parts).symmetric == symmetric
    whole = join(list(cases.values()))
    assert torch.equal(fusion.read_int4(fmt, parts, torch.bfloat16).dequantize(), whole.dense())
    assert torch.equal(fusion.read_dense(fmt.ckpt, parts, "bias"), whole.bias)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_checkpoint_split_model(write: Callable[..., None], symmetric: bool, tmp_path: Path) -> None:
    cases = {name: part(name, i, symmetric=symmetric) for i, name in enumerate(ROWS)}
    write(tmp_path, {}, {"x.qkv_proj": join(list(cases.values()))})
    fmt = opened(tmp_path)
    shapes = {f"x.{name}": (rows, K) for name, rows in ROWS.items()}
    for name, expected in cases.items():
        parts = parts_of(fmt, f"x.{name}", shapes)
        weight = fusion.read_int4(fmt, parts, torch.bfloat16)
        assert torch.equal(weight.dequantize(), expected.dense())
        assert weight.packed.untyped_storage().nbytes() == weight.packed.nbytes  # not a view that keeps the whole
        assert torch.equal(fusion.read_dense(fmt.ckpt, parts, "bias"), expected.bias)


def test_symmetric_and_asymmetric_parts_are_joined(tmp_path: Path) -> None:
    cases = {name: part(name, i, symmetric=name == "k_proj") for i, name in enumerate(ROWS)}
    write_compressed_tensors(tmp_path, {}, {f"x.{name}": c for name, c in cases.items()})
    fmt = opened(tmp_path)
    parts = parts_of(fmt, "x.qkv_proj", {"x.qkv_proj": (88, K)})
    assert not fusion.check_int4(fmt, parts).symmetric
    dense = torch.cat([c.dense() for c in cases.values()])
    assert torch.equal(fusion.read_int4(fmt, parts, torch.bfloat16).dequantize(), dense)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    modules = {
        "x.q_proj": part("q_proj", 0),
        "x.k_proj": replace(random_case(16, K, None), bias=None),
        "y.o_proj": part("q_proj", 1),
    }
    dense = {"x.v_proj.weight": torch.zeros(24, K)}
    write_compressed_tensors(tmp_path, {}, modules, dense)
    fmt = opened(tmp_path)
    parts = parts_of(fmt, "x.qkv_proj", {"x.qkv_proj": (88, K)})
    with pytest.raises(UnsupportedError, match=r"tensor x\.v_proj\.weight: expected all of .* int4, or all dense, found some"):
        fusion.is_int4(fmt, parts)
    with pytest.raises(UnsupportedError, match=r"tensor x\.q_proj: expected one group size .*, found x\.q_proj"):
        fusion.read_int4(fmt, parts[:2], torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"tensor x\.qkv_proj\.weight: expected shape \[90, 96\], found 88 rows"):
        parts_of(fmt, "x.qkv_proj", {"x.qkv_proj": (90, K)})
    with pytest.raises(
        CheckpointError, match=r"tensor y\.o_proj\.weight: expected shape \[48, 64\], found 48 rows of .*, K = 96"
    ):
        parts_of(fmt, "y.o_proj", {"y.o_proj": (48, 64)})
    with pytest.raises(CheckpointError, match=r"/model\.safetensors, tensor x\.up_proj\.weight: expected .*, found none"):
        parts_of(fmt, "x.up_proj", {"x.up_proj": (48, K)})
    with pytest.raises(CheckpointError, match=r"tensor a\.qkv_proj: expected 48 \+ 16 \+ 0 rows .*, found 88 rows"):
        resolve("a.q_proj", {"a.q_proj": (48, K), "a.k_proj": (16, K)}, {"a.qkv_proj": (88, K)}.get)
