"""The Triton products, `int4` and `fused`, against float64; on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, random_weight
from tests.kernels.cases import (
    AMPERE_TILES,
    CASES,
    DEVICE,
    HOPPER_FEW_TILES,
    HOPPER_TILES,
    LINEAR_TILES,
    ON_AMPERE,
    ON_HOPPER,
    WIDE_TILES,
    Case,
)
from twinweight.kernels import gpu, reference
from twinweight.kernels.decode import int4_linear
from twinweight.kernels.fused import Tiles as AnyTiles
from twinweight.kernels.fused import fused_linear
from twinweight.kernels.prepared import KernelWeight

Tiles = AnyTiles | None
CHOICES = [pytest.param("int4", tiles, id=f"int4-{name}") for name, tiles in LINEAR_TILES.items()] + [
    pytest.param("fused", None, id="fused-chosen")
]

FEW_TILES: dict[str, AnyTiles] = {**AMPERE_TILES, **(HOPPER_FEW_TILES if ON_HOPPER else {})}


def worth_it(case: Case, tiles: Tiles) -> bool:
    """On a GPU everything; the interpreter takes 20 ms a program, so forced tiles meet only cases of few programs there."""
    few = case.n <= 100 and case.m <= 17
    return DEVICE.type == "cuda" or tiles is None or few


PAIRS = [
    pytest.param(case, choice.values[0], choice.values[1], id=f"{case}-{choice.id}")
    for case in CASES
    for choice in CHOICES
    if worth_it(case, choice.values[1])
]
PAIRS += [
    pytest.param(case, "int4", tiles, id=f"{case}-int4-{name}")
    for case in CASES
    for name, tiles in WIDE_TILES.items()
    if worth_it(case, tiles) and (case.group_size == case.k or case.group_size % (8 * tiles.block_words) == 0)
]
PAIRS += [
    pytest.param(case, "fused", tiles, id=f"{case}-fused-{name}")
    for case in CASES
    for name, tiles in HOPPER_TILES.items()
    if ON_HOPPER and case.k % 64 == 0 and not case.strided
]
PAIRS += [
    pytest.param(case, "int4", tiles, id=f"{case}-int4-{name}")
    for case in CASES
    for name, tiles in FEW_TILES.items()
    if ON_AMPERE and not case.strided and case.k % (8 * tiles.block_words * tiles.depth) == 0
    if case.k > 16 * tiles.block_words * tiles.depth * (tiles.split_k - 1)
    if case.group_size == case.k or case.group_size % (8 * tiles.block_words) == 0
]


def run(path: str, x: Tensor, w: KernelWeight, bias: Tensor | None, tiles: Tiles, out: Tensor | None = None) -> Tensor:
    linear = int4_linear if path == "int4" else fused_linear
    return linear(x, w.packed, w.scales, w.zeros, bias, group_size=w.group_size, out=out, tiles=tiles)


def rows_apart(rows: int, columns: int, dtype: torch.dtype, gap: int) -> Tensor:
    return torch.full((rows, columns + gap), float("nan"), dtype=dtype, device=DEVICE)[:, :columns]


@pytest.mark.parametrize(("case", "path", "tiles"), PAIRS)
def test_against_float64(case: Case, path: str, tiles: Tiles) -> None:
    torch.manual_seed(case.m)
    w = case.weight()
    x = rows_apart(case.m, case.k, case.dtype, 5 if case.strided else 0)
    x.copy_(torch.randn(case.m, case.k))
    bias = torch.randn(case.n).to(DEVICE, case.dtype) if case.bias else None
    out = rows_apart(case.m, case.n, case.dtype, 3) if case.strided else None
    result = run(path, x, gpu.prepare(w), bias, tiles, out)
    assert out is None or result is out
    if out is not None:
        assert bool(out.as_strided((case.m, 3), (out.stride(0), 1), case.n).isnan().all()), "wrote between the rows"
    assert result.dtype == case.dtype
    assert_close(result, reference.linear(x, w, bias))


@pytest.mark.parametrize(("path", "tiles"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("k", "group_size", "symmetric"), [(160, 32, False), (91, 91, False)])
def test_identity_gives_the_weight(
    k: int, group_size: int, symmetric: bool, dtype: torch.dtype, path: str, tiles: Tiles
) -> None:
    w = random_weight(16, k, group_size, dtype, symmetric, seed=k).to(DEVICE)
    columns = slice(None) if DEVICE.type == "cuda" else slice(None, None, 17)  # the interpreter is slow; 17 meets every nibble
    result = run(path, torch.eye(k, dtype=dtype, device=DEVICE)[columns], gpu.prepare(w), None, tiles)
    assert torch.equal(result.T, w.dequantize(dtype)[:, columns])


@pytest.mark.skipif(not ON_AMPERE, reason="needs an NVIDIA GPU, Ampere or later")
@pytest.mark.parametrize("tiles", FEW_TILES.values(), ids=FEW_TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("k", "group_size", "symmetric"), [(768, 128, False), (768, 128, True), (1024, 1024, False)])
def test_identity_gives_the_weight_in_tiles_of_few_rows(
    k: int, group_size: int, symmetric: bool, dtype: torch.dtype, tiles: Tiles
) -> None:
    w = random_weight(176, k, group_size, dtype, symmetric, seed=k).to(DEVICE)
    result = run("int4", torch.eye(k, dtype=dtype, device=DEVICE), gpu.prepare(w), None, tiles)
    assert torch.equal(result.T, w.dequantize(dtype))


@pytest.mark.parametrize("path", ["int4", "fused"])
@pytest.mark.parametrize("m", [1, 16])
def test_scales_of_another_dtype(m: int, path: str) -> None:
    w = random_weight(32, 64, 32, torch.float16, symmetric=False).to(DEVICE)
    x = torch.eye(64, dtype=torch.bfloat16, device=DEVICE)[:m]
    assert torch.equal(run(path, x, gpu.prepare(w), None, None).T, w.dequantize(torch.bfloat16)[:, :m])


@pytest.mark.parametrize("path", ["int4", "fused"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 65, dtype=torch.bfloat16)}, "packed"),
        ({"x": torch.zeros(2, 64)}, "x: expected"),
        ({"x": torch.zeros(64, 2, dtype=torch.bfloat16).T}, "x: expected"),
        ({"packed": torch.zeros(32, 8, dtype=torch.int64)}, "packed"),
        ({"packed": torch.zeros(32, 8, dtype=torch.int32).T.contiguous().T}, "packed"),
        ({"scales": torch.zeros(32, 3, dtype=torch.bfloat16)}, "scales"),
        ({"zeros": torch.zeros(32, 2)}, "zeros"),
        ({"bias": torch.zeros(31, dtype=torch.bfloat16)}, "bias"),
        ({"out": torch.zeros(3, 32, dtype=torch.bfloat16)}, "out"),
        ({"group_size": 48}, "group_size"),
        ({"group_size": 16}, "group_size"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, object], named: str, path: str) -> None:
    w = gpu.prepare(random_weight(32, 64, 32, symmetric=False))
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 64, dtype=torch.bfloat16),
        "packed": w.packed,
        "scales": w.scales,
        "zeros": w.zeros,
        "bias": None,
        "group_size": 32,
        **change,
    }
    arguments = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    with pytest.raises(ValueError, match=named):
        (int4_linear if path == "int4" else fused_linear)(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["int4", "fused"])
def test_wide_steps_need_wide_groups(path: str) -> None:
    w = gpu.prepare(random_weight(32, 128, 32).to(DEVICE))
    with pytest.raises(ValueError, match="block_words"):
        run(path, torch.zeros(2, 128, dtype=torch.bfloat16, device=DEVICE), w, None, WIDE_TILES["dot-wide"])


def test_splitting_again_starts_from_zeros() -> None:
    w = gpu.prepare(random_weight(48, 320, 64).to(DEVICE))
    x = torch.randn(3, 320, dtype=torch.float32, device=DEVICE).bfloat16()
    first, again = (run("int4", x, w, None, LINEAR_TILES["dot-split"]) for _ in range(2))
    assert torch.equal(first, again)
