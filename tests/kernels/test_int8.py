"""The int8 twin of a CPU: how far its weight and its product may be off, odd sizes, tiles, values that are no numbers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_close
from twinweight.kernels import int8

pytestmark = pytest.mark.skipif(not int8.available(), reason="needs a CPU with VNNI or AMX")

SIZES = [(0, 64, 128), (1, 1, 1), (1, 65, 33), (3, 7, 129), (17, 130, 96), (64, 64, 256), (70, 200, 512)]


def rows(m: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 33), (64, 256)])
def test_a_weight_is_off_by_half_a_scale_at_most(n: int, k: int, dtype: torch.dtype) -> None:
    dense = rows(n, k, dtype)
    before = dense.clone()
    data, scales = int8.quantize_weight(dense)
    assert torch.equal(dense, before)
    assert (data.shape, data.dtype, scales.shape, scales.dtype) == ((n, k), torch.int8, (n,), torch.float32)
    error = (data.double() * scales.double()[:, None] - dense.double()).abs()
    assert bool((error <= scales.double()[:, None] * 0.5001).all())
    assert bool((data.abs().amax(1) == 127).all())  # the whole range is used


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_the_product_is_that_of_the_rounded_sides(m: int, n: int, k: int, bias: bool) -> None:
    x, weight = rows(m, k), int8.quantize_weight(rows(n, k, seed=1))
    b = rows(1, n, seed=2)[0] if bias else None
    y = int8.linear(x, *weight, b)
    assert (y.shape, y.dtype) == ((m, n), x.dtype)
    quantized, tokens = int8.quantize_rows(x)
    expected = (quantized.double() * tokens.double()[:, None]) @ (weight[0].double() * weight[1].double()[:, None]).t()
    assert_close(y, expected + (b.double() if b is not None else 0), 5e-3, 3e-3)  # the one rounding to bf16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_near_the_exact_product(dtype: torch.dtype) -> None:
    x, w = rows(48, 512, dtype), rows(96, 512, torch.float32, seed=1)
    assert_close(int8.linear(x, *int8.quantize_weight(w), None), x.double() @ w.double().t(), 2e-2, 2e-2)


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = rows(70, 96), int8.quantize_weight(rows(300, 96, seed=1)), rows(1, 300, seed=2)[0]
    whole = int8.linear(x, *weight, bias)
    for name, value in {"_QUANTIZED": 1000, "_PRODUCTS": 4000, "_ROWS": 32}.items():
        monkeypatch.setattr(int8, name, value)
    assert torch.equal(int8.linear(x, *weight, bias), whole)


def test_sums_do_not_saturate() -> None:
    """The largest products there are: pairs of them leave 16 bits, all of them stay in 32."""
    for k in (256, 4096, int8.MAX_K):
        x = torch.ones(2, k, dtype=torch.bfloat16)
        y = int8.linear(x, torch.full((64, k), 127, dtype=torch.int8), torch.full((64,), 1 / 127), None)
        assert_close(y, torch.full((2, 64), float(k)), 5e-3, 5e-3)


def test_zeros_stay_zeros_and_other_rows_do_not_see_a_nan() -> None:
    weight = int8.quantize_weight(torch.cat((rows(3, 64), torch.zeros(1, 64))))
    assert not weight[0][3].any()
    x = rows(4, 64)
    x[1], x[2, 5], x[3, 7] = 0, torch.nan, torch.inf
    y = int8.linear(x, *weight, None)
    assert torch.equal(y[0], int8.linear(x[:1], *weight, None)[0])
    assert not y[1].any()
    assert not torch.isfinite(y[2:, :3]).any()


@pytest.mark.parametrize("flags", ["avx2 fma", "avx512f avx512bw", "", "avx2 avx_vnni", "amx_int8", "avx512_vnni"])
def test_offered_only_where_the_instruction_is(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8.Path, "read_text", lambda *a, **k: f"model name\t: x\nflags\t\t: fpu {flags}\n")
    int8.available.cache_clear()
    assert int8.available() == ("vnni" in flags or "amx" in flags)
    int8.available.cache_clear()


def test_not_offered_where_products_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.full((a.shape[0], b.shape[1]), 2**15 - 1))
    int8.available.cache_clear()
    assert not int8.available()
    int8.available.cache_clear()
