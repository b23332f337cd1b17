"""How far 8-bit twins are from int4, on a tiny model: against the definitions, and the real int8 against its emulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.engines.test_hf import CASES, Case, ids_of, load, needs_int8, write
from tests.helpers import assert_close, random_weight
from twinweight import emulation, quality, twin
from twinweight.kernels import int8
from twinweight.linear import Int4Linear
from twinweight.paths import Path as Way
from twinweight.paths import Route
from twinweight.twins import int4_linears


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    out = tmp_path_factory.mktemp("tiny")
    write(out, CASES[0])
    return load(out)


@needs_int8
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, True)])
def test_the_int8_twin_computes_what_its_emulation_does(symmetric: bool, act_order: bool) -> None:
    linear = Int4Linear(random_weight(96, 256, 32, symmetric=symmetric, act_order=act_order), torch.randn(96).bfloat16())
    linear.build_twin("int8")
    linear.route_with_twin = Route.always(Way.TWIN)
    x = torch.randn(3, 11, 256).bfloat16()
    real = linear(x)
    with emulation.emulated(torch.nn.Sequential(linear), "int8"):
        assert_close(real, linear(x).double(), 1e-2, 4e-3)  # bf16 once, at the end, on both sides
    assert torch.equal(linear(x), real)


def test_e4m3_steps() -> None:
    """Three bits of mantissa: at most a sixteenth off, and the int4 grid is exact."""
    x = torch.randn(4, 256)
    for kind in ("fp8-row", "fp8-exact"):
        rounded = emulation.activations(kind, x)
        assert bool(((rounded - x).abs() <= x.abs() / 16 + x.abs().amax() * 2**-17).all())
        assert not torch.equal(rounded, x)
    grid = torch.arange(-15, 16).float()
    assert torch.equal(grid.to(torch.float8_e4m3fn).float(), grid)
    one = torch.zeros(1, 256)
    one[0, 0] = 1000
    assert torch.equal(emulation.activations("fp8-exact", one + 1e-3)[0, 128:], (one + 1e-3)[0, 128:])  # blocks have own scales


def test_int4_is_no_distance_from_itself_and_perplexity_is_that_of_perplexity(model: PreTrainedModel) -> None:
    ids = ids_of(1, 100)[0]
    with quality.arm(model, "int4"):
        found = quality.distance(model, ids, context=48)
        assert found["kl"] == 0
        assert found["top1"] == 1
        assert found["ppl"] == pytest.approx(quality.perplexity(model, ids, context=48), rel=1e-5)


def test_distance_follows_the_definition(model: PreTrainedModel) -> None:
    ids = ids_of(1, 33)[0]
    with emulation.emulated(model, "fp8-row"):
        found = quality.distance(model, ids)
        with torch.inference_mode():
            q = model(input_ids=ids[None, :-1]).logits.double().softmax(-1)
    with quality.arm(model, "int4"), torch.inference_mode():
        p = model(input_ids=ids[None, :-1]).logits.double().softmax(-1)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert found["kl"] > 1e-5
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-5)


def test_a_kind_that_the_device_has_not_is_emulated(model: PreTrainedModel) -> None:
    before = {name: m.twin_kind for name, m in int4_linears(model).items()}
    found = quality.lossy(model, ids_of(1, 33)[0], tuple(twin.LOSSY))
    # Groups of 32 have no exact fp8 form.
    assert [(f["kind"], f["emulated"]) for f in found] == [("int8", not int8.available()), ("fp8-row", True)]
    assert all(0 < f["kl"] < 0.05 and f["top1"] > 0.5 for f in found)
    assert {name: m.twin_kind for name, m in int4_linears(model).items()} == before


def test_weights_without_blocks_of_128_columns_have_no_exact_fp8_form(tmp_path: Path) -> None:
    write(tmp_path, Case("compressed-tensors", group_size=None))
    model = load(tmp_path, mode="off")
    assert [f["kind"] for f in quality.lossy(model, ids_of(1, 9)[0], ["fp8-exact"])] == []
