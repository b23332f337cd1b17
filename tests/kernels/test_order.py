"""The kernels' column order: what the text of `order.py` says, and back again."""

import pytest
import torch

from tests.helpers import random_weight
from twinweight.kernels.order import from_kernel_order, padded_rows, padded_words, to_kernel_order
from twinweight.weight import unpack_nibbles


@pytest.mark.parametrize("k", [1, 8, 63, 64, 91, 128, 859])
@pytest.mark.parametrize("n", [5, 16, 33])
@pytest.mark.parametrize("shuffled", [False, True])
def test_there_and_back(n: int, k: int, shuffled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinweight.kernels.order.TILE_BYTES", 16 * padded_words(k) * 32)  # 16 rows a tile
    w = random_weight(n, k, k)
    perm = torch.randperm(k) if shuffled else None
    stored = to_kernel_order(w.packed, k, perm)
    assert stored.shape == (padded_rows(n), padded_words(k))
    columns = perm if perm is not None else torch.arange(k)
    nibbles = unpack_nibbles(stored.view(-1, 8)).view(padded_rows(n) // 16, -1, 16, 64)
    rows = torch.arange(n)
    for at in range(k):
        block, rest = divmod(at, 64)
        j, (i, half) = rest // 16, divmod(rest % 16, 2)
        found = nibbles[rows // 16, block, rows % 16, i * 8 + 4 * half + j]
        assert torch.equal(found, w.values()[:, columns[at]])
    assert torch.equal(unpack_nibbles(from_kernel_order(stored, n, k, perm))[:, :k], w.values())


def test_no_rows() -> None:
    assert to_kernel_order(torch.empty(0, 8, dtype=torch.int32), 64).shape == (0, 8)
