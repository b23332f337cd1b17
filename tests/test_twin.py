"""Kinds of twin: requests, where each fits, bytes, and their products on the device that has them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_close, random_weight
from twinweight import emulation, twin
from twinweight.errors import ConfigError
from twinweight.kernels import int8
from twinweight.linear import Int4Linear
from twinweight.paths import Path, Route

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HERE = GPU if torch.cuda.is_available() else CPU


@pytest.mark.parametrize(("value", "expected"), [(None, "dense"), ("", "dense"), ("int8", "int8"), ("fp8-row", "fp8-row")])
def test_the_environment(value: str | None, expected: str) -> None:
    assert twin.request(None, {} if value is None else {twin.VARIABLE: value}) == expected


def test_bad_requests_are_named() -> None:
    with pytest.raises(ConfigError, match="TWINWEIGHT_DTYPE: twin dtype is 'e4m3', expected one of dense, int8, fp8"):
        twin.request(None, {twin.VARIABLE: "e4m3"})
    with pytest.raises(ConfigError, match="is 'fp4'"):
        twin.check_request("fp4")


@pytest.mark.parametrize(
    ("kind", "n", "k", "group", "act_order", "device", "capability", "word"),
    [
        ("int8", 1, 1, 1, True, CPU, None, None),
        ("int8", 64, int8.MAX_K + 1, 128, False, CPU, None, "int32"),
        ("int8", 64, 64, 32, False, GPU, (9, 0), "only on a CPU"),
        ("fp8-row", 64, 64, 32, False, CPU, None, "only on a GPU"),
        ("fp8-row", 48, 80, 16, True, GPU, (8, 9), None),
        ("fp8-row", 48, 72, 8, False, GPU, (9, 0), "multiples of 16"),
        ("fp8-row", 50, 64, 32, False, GPU, (9, 0), "multiples of 16"),
        ("fp8-row", 64, 64, 32, False, GPU, (8, 6), "capability 8.9"),
        ("fp8-exact", 64, 256, 128, False, GPU, (9, 0), None),
        ("fp8-exact", 64, 256, 256, False, GPU, (9, 0), None),
        ("fp8-exact", 64, 256, 64, False, GPU, (9, 0), "groups of 64 are not blocks"),
        ("fp8-exact", 64, 256, 128, True, GPU, (9, 0), "act-order"),
        ("fp8-exact", 64, 192, 192, False, GPU, (9, 0), "multiples of 16 and 128"),
        ("fp8-exact", 64, 256, 128, False, GPU, (8, 9), "capability 9.0"),
    ],
)
def test_where_a_kind_fits(
    kind: str, n: int, k: int, group: int, act_order: bool, device: torch.device, capability: tuple[int, int] | None,
    word: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(int8, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = twin.refusal(kind, n, k, group, act_order, device)
    assert (reason is None) if word is None else (reason is not None and word in reason)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", *twin.LOSSY])
def test_bytes_and_kind_of_an_empty_twin(kind: str) -> None:
    data, scales = twin.empty(kind, 48, 256, CPU)
    assert twin.kind_of(data, scales) == kind
    assert data.nbytes + (scales.nbytes if scales is not None else 0) == twin.nbytes(kind, 48, 256, CPU)
    if kind == "fp8-exact":
        assert scales is not None
        assert (scales.shape, scales.stride()) == ((48, 2), (1, 48))


def kinds_here() -> list[str]:
    return [k for k in ("bfloat16", *twin.LOSSY) if k not in twin.LOSSY or twin.refusal(k, 64, 256, 128, False, HERE) is None]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", kinds_here())
def test_a_twin_holds_and_computes_what_its_emulation_says(kind: str, symmetric: bool) -> None:
    weight = random_weight(64, 256, 128, symmetric=symmetric)
    linear = Int4Linear(weight.to(HERE), torch.randn(64).bfloat16().to(HERE))
    linear.build_twin(kind)
    linear.route_with_twin = Route.always(Path.TWIN)
    assert linear.twin is not None
    assert linear.twin_kind == kind
    assert linear.twin_bytes == twin.nbytes(kind, 64, 256, HERE)
    dense = linear.int4_weight.dequantize(torch.float32)
    if kind in twin.LOSSY:
        dense = emulation.weight(kind, dense)
    # On a GPU an fp8-row twin is made from rows in bf16, whose rounding can move a value to the next step.
    assert_close(twin.dequantize(linear.twin, linear.twin_scales), dense.double(), 1e-1, 8e-3 if kind == "fp8-row" else 3e-3)
    for m in (1, 24, 70):
        x = torch.randn(m, 256).bfloat16().to(HERE)
        rounded = emulation.activations(kind, x) if kind in twin.LOSSY else x.float()
        assert linear.bias is not None
        assert_close(linear(x), rounded.double() @ dense.double().t() + linear.bias.double(), 2e-2, 1e-2)
    linear.set_weight(random_weight(64, 256, 128, symmetric=symmetric, seed=1).to(HERE))
    fresh = Int4Linear(linear.int4_weight)
    fresh.build_twin(kind)
    assert torch.equal(linear.twin.float(), fresh.twin.float() if fresh.twin is not None else None)
