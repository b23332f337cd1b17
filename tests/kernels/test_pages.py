"""Advice on pages changes no value and never fails."""

import pytest
import torch

from twinweight.kernels.pages import in_huge_pages


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (2 << 20) - 1, 5 << 20])
def test_the_tensor_is_as_good_as_before(nbytes: int) -> None:
    t = torch.empty(nbytes, dtype=torch.uint8)
    assert in_huge_pages(t) is t
    t.fill_(7)
    assert int(t.sum(dtype=torch.int64)) == 7 * nbytes
