"""The integers behind a dense weight come back: what they dequantize to is the weight, bit for bit."""

import pytest
import torch

from tests.helpers import random_weight
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


@pytest.mark.parametrize(("n", "k", "group"), [(8, 128, 128)])
def test_a_dense_weight_has_none(n: int, k: int, group: int) -> None:
    assert recover(torch.randn(n, k).bfloat16(), group) is None


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
