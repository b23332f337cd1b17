"""The integers behind a dense weight come back: what they dequantize to is the weight, bit for bit."""

import pytest
import torch

from tests.helpers import random_weight
from tests.kernels.cases import DEVICE
from twinweight import recover as recover_module
from twinweight.kernels.recover import recover_groups
from twinweight.recover import recover
from twinweight.weight import from_values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 128), (7, 96, 32), (33, 77, 77)])
def test_comes_back(n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    dense = random_weight(n, k, group, dtype, symmetric).dequantize()
    found = recover(dense, group)
    assert found is not None
    assert torch.equal(found.dequantize(), dense)
    assert not symmetric or found.zeros is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_negative_scales_need_no_zero_points(symmetric: bool) -> None:
    """As AutoRound writes them, and as dummy weights have them."""
    weight = random_weight(16, 256, 64, symmetric=symmetric)
    weight.scales[::3] *= -1
    dense = weight.dequantize()
    found = recover(dense, 64)
    assert found is not None
    assert torch.equal(found.dequantize(), dense)
    assert (found.zeros is None) == symmetric


@pytest.mark.parametrize("value", [0, 1, 7, 8, 9, 15])
def test_groups_of_one_value(value: int) -> None:
    values = torch.full((4, 64), value)
    values[0, 0] = 15 - value
    dense = from_values(
        values, torch.tensor([[0.013], [1.0], [3.1], [1e-3]]).bfloat16(), None, None, group_size=64
    ).dequantize()
    found = recover(dense, 64)
    assert found is not None
    assert torch.equal(found.dequantize(), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96, 128])
def test_the_kernel_of_gpus_finds_the_same(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = random_weight(24, 2 * group, group, dtype, symmetric)
    values = weight.dequantize().view(-1, group)
    values[3:9] = 0
    values[5] = torch.randn(group).to(dtype)  # has no form
    expected = torch.empty_like(values, dtype=torch.int8), torch.empty_like(values[:, 0])
    rest = torch.arange(len(values)) != 5
    assert recover_module._recover_groups(values[rest], *(parts := (expected[0][rest], expected[1][rest])))
    steps, scales = (t.to(DEVICE) for t in expected)
    found = recover_groups(values.to(DEVICE), steps, scales, recover_module._LIKELY, recover_module._STEPS)
    assert torch.equal(found.bool().cpu(), rest)
    assert torch.equal(steps.cpu()[rest], parts[0])
    assert torch.equal(scales.cpu()[rest], parts[1])


@pytest.mark.parametrize(("n", "k", "group"), [(8, 128, 128)])
def test_a_dense_weight_has_none(n: int, k: int, group: int) -> None:
    assert recover(torch.randn(n, k).bfloat16(), group) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("zero", [False, True])
def test_what_is_no_number_has_none(value: float, count: int, zero: bool) -> None:
    dense = random_weight(2, 32, 32).dequantize()
    dense[1] *= not zero
    dense[1, :count] = value
    assert recover(dense, 32) is None
    steps, scales = torch.empty(2, 32, dtype=torch.int8, device=DEVICE), torch.empty(2, dtype=dense.dtype, device=DEVICE)
    found = recover_groups(dense.to(DEVICE), steps, scales, recover_module._LIKELY, recover_module._STEPS)
    assert found.tolist() == [1, 0]


def test_rows_may_be_padded() -> None:
    dense = random_weight(8, 64, 64).dequantize()
    padded = torch.full((8, 96), 7.0, dtype=dense.dtype)
    padded[:, :64] = dense
    found = recover(padded[:, :64], 64)
    assert found is not None
    assert torch.equal(found.dequantize(), dense)


def test_groups_divide_rows() -> None:
    with pytest.raises(ValueError, match="divisor of K"):
        recover(torch.zeros(2, 65).bfloat16(), 32)


def test_sevens_need_no_zero_points() -> None:
    values = torch.full((4, 64), 8)
    values[:, ::3] = 15
    dense = from_values(values, torch.full((4, 1), 0.013).bfloat16(), None, None, group_size=64).dequantize()
    found = recover(dense, 64)
    assert found is not None
    assert found.zeros is None
    assert torch.equal(found.dequantize(), dense)
