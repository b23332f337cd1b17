"""8-bit twins: exact where they say so, scales and layouts as `torch._scaled_mm` takes them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_weight
from tests.kernels.cases import DEVICE
from twinweight import twin
from twinweight.errors import UnsupportedError
from twinweight.kernels import fp8, gpu
from twinweight.kernels.reference import linear as reference

HAS_FP8 = DEVICE.type == "cuda" and fp8.supported(DEVICE)


def assert_rounded(y: torch.Tensor, exact: torch.Tensor) -> None:
    """y is `exact` rounded to e4m3. Triton's interpreter rounds ties away from zero and loses a carry into the exponent."""
    same = (y.float() - exact).abs() <= exact.abs() / 16 + 2**-10
    assert float(same.float().mean()) >= (1 if DEVICE.type == "cuda" else 0.95) or y.numel() == 0


def random(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator).exp()
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("m", "k"), [(0, 64), (1, 64), (3, 91), (17, 256)])
def test_quantize_rows(m: int, k: int, dtype: torch.dtype) -> None:
    x = random(m, k, dtype)
    y, scale = fp8.quantize_rows(x)
    assert (y.shape, y.dtype, scale.shape) == (x.shape, fp8.E4M3, (m,))
    if m:
        assert torch.allclose(scale, x.float().abs().amax(1) / 448, rtol=1e-6)
    assert_rounded(y, x.float() / scale[:, None])


@pytest.mark.parametrize(("m", "k"), [(0, 128), (1, 128), (19, 384)])
def test_quantize_groups(m: int, k: int) -> None:
    x = random(m, k)
    y, scale = fp8.quantize_groups(x)
    rows = -(-m // 4) * 4
    assert (y.shape, scale.shape, scale.stride()) == ((rows, k), (rows, k // 128), (1, max(rows, 1)))
    assert bool((y.float()[m:] == 0).all())
    y, scale = y[:m], scale[:m]
    wide = scale.repeat_interleave(128, 1)
    if m:
        assert torch.allclose(scale, x.float().abs().view(m, -1, 128).amax(2) / 448, rtol=1e-6)
    assert_rounded(y, x.float() / wide)


def test_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 128, dtype=torch.bfloat16, device=DEVICE)
    for y, scale in (fp8.quantize_rows(x), fp8.quantize_groups(x)):
        assert bool(((y.float() == 0) & (scale > 0).all()).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "group_size"), [(256, 128), (512, 256), (128, 128), (384, 384)])
def test_exact_twin_is_exact(k: int, group_size: int, symmetric: bool) -> None:
    weight = random_weight(40, k, group_size, symmetric=symmetric).to(DEVICE)
    w = gpu.prepare(weight)
    data, scales = fp8.exact_twin(w.packed, w.scales, w.zeros, group_size)
    assert (scales.shape, scales.stride(0)) == ((40, k // 128), 1)
    dense = data.double() * scales.double().repeat_interleave(128, 1)
    zero = weight.zeros.double().repeat_interleave(group_size, 1) if weight.zeros is not None else 8
    assert torch.equal(dense, (weight.values().double() - zero) * weight.scales.double().repeat_interleave(group_size, 1))


def test_exact_twin_refuses_fine_groups() -> None:
    w = gpu.prepare(random_weight(16, 128, 32).to(DEVICE))
    with pytest.raises(UnsupportedError, match="128"):
        fp8.exact_twin(w.packed, w.scales, w.zeros, 32)


@pytest.mark.parametrize("act_order", [False, True])
def test_row_twin(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "TILE_BYTES", 2 * 96 * 24)  # 24 rows a tile
    weight = random_weight(40, 96, 32, symmetric=False, act_order=act_order).to(DEVICE)
    dense = weight.dequantize()
    for found in (fp8.row_twin(dense), fp8.row_twin(gpu.prepare(weight))):
        data, scales = found
        assert torch.equal(data.float(), fp8.quantize_rows(dense)[0].float())
        assert scales.shape == (40,)


@pytest.mark.skipif(not HAS_FP8, reason="e4m3 products need a GPU that has them")
@pytest.mark.parametrize("m", [1, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_linear(m: int, bias: bool, dtype: torch.dtype) -> None:
    weight = random_weight(256, 512, 128, dtype, symmetric=False).to(DEVICE)
    w, x = gpu.prepare(weight), random(m, 512, dtype)
    b = torch.randn(256, device=DEVICE, dtype=dtype) if bias else None
    truth = reference(x, weight, b)
    for y in (
        fp8.row_linear(x, *fp8.row_twin(w), b),
        fp8.exact_linear(x, *fp8.exact_twin(w.packed, w.scales, w.zeros, 128), b),
    ):
        assert y.dtype == dtype
        assert float((y.double() - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize("kind", ["fp8-row", "fp8-exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_was_worked_out_serves_other_x(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product itself, where no GPU has it, is that of what it is given."""

    def product(x: torch.Tensor, w: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, **_: object) -> torch.Tensor:
        a, b = scale_a.repeat_interleave(256 // scale_a.shape[1], 1), scale_b.repeat_interleave(256 // scale_b.shape[0], 0)
        return ((x.float() * a) @ (w.float() * b)).bfloat16()

    if not HAS_FP8:
        monkeypatch.setattr(torch, "_scaled_mm", product)
        monkeypatch.setattr(fp8, "_gives_fp16", lambda device: False)
    weight = gpu.prepare(random_weight(32, 256, 128, dtype).to(DEVICE))
    data, scales = twin.empty(kind, 32, 256, DEVICE)
    twin.fill(weight, data, scales)
    assert scales is not None
    again = twin.again(random(8, 256, dtype), data, scales)
    assert again is not None
    x = random(8, 256, dtype)
    y = again(x, *twin.turned(data, scales))
    assert y.dtype == dtype
    assert torch.equal(y, twin.linear(x, data, scales, None))
    if kind == "fp8-exact":
        assert twin.again(random(7, 256, dtype), data, scales) is None  # its rows are padded
    assert twin.again(random(256, 8, dtype).t(), data, scales) is None
    assert twin.again(random(0, 256, dtype), data, scales) is None


def test_a_twin_from_the_dense_weight_is_the_same() -> None:
    weight = random_weight(96, 256, 128).to(DEVICE)
    found, again = (twin.empty("fp8-row", 96, 256, DEVICE) for _ in range(2))
    twin.fill(gpu.prepare(weight), *found)
    twin.fill(weight.dequantize(), *again)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_other_kinds_need_the_integers() -> None:
    with pytest.raises(ValueError, match="expected an int4 weight for a twin of kind fp8-exact, found a dense one"):
        twin.fill(torch.zeros(16, 128).bfloat16(), *twin.empty("fp8-exact", 16, 128, torch.device("cpu")))
