"""What lanes hold in `ampere.py`, from its layouts alone: no GPU is needed to see that words and x meet in the same columns."""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import Any

import pytest
import torch

from tests.helpers import random_weight
from twinweight.kernels.order import to_kernel_order
from twinweight.weight import unpack_nibbles

ampere = pytest.importorskip("twinweight.kernels.ampere", reason="this Triton has no Gluon")


def held(bases: list[list[int]], index: int) -> tuple[int, int]:
    """Where a linear layout puts the register, lane or warp of an index: the exclusive or of the bases of its bits."""
    chosen = [base for bit, base in enumerate(bases) if index >> bit & 1]
    return reduce(xor, (b[0] for b in chosen), 0), reduce(xor, (b[1] for b in chosen), 0)


def places(layout: Any, register: int, lane: int) -> tuple[int, int]:
    """The element that a register of a lane of the first warp holds."""
    pairs = (held(layout.reg_bases, register), held(layout.lane_bases, lane))
    return pairs[0][0] ^ pairs[1][0], pairs[0][1] ^ pairs[1][1]


@pytest.mark.parametrize("words", [8, 16])
def test_words_and_x_have_their_columns_in_one_order(words: int) -> None:
    k = 8 * words
    w = random_weight(16, k, k)
    stored = to_kernel_order(w.packed, k).view(-1, 16, 8)  # blocks, of 16 rows, of 8 words
    ordered = ampere._in_halves.fn(stored.permute(1, 0, 2).reshape(16, words))
    # As `integer_tile` unpacks: quarter j of every block is 16 columns, two neighbours a word.
    nibbles = unpack_nibbles(ordered.reshape(-1, 8).contiguous()).view(
        16, words // 8, 8, 2, 4
    )  # row, block, word, half, quarter
    tile = nibbles.permute(0, 1, 4, 2, 3).reshape(16, k).double()
    x = torch.randn(k, 8, dtype=torch.float64)
    assert torch.allclose(tile @ ampere._columns_in_halves.fn(x), w.values().double() @ x)


@pytest.mark.parametrize(("rows", "words", "warps"), [(64, 16, 4), (32, 8, 2), (64, 8, 2), (128, 16, 4)])
def test_lanes_hold_the_words_that_their_products_take(rows: int, words: int, warps: int) -> None:
    stored, named = (ampere.words_layout(rows, words, warps, halves) for halves in (False, True))
    labels = ampere._in_halves.fn(torch.arange(words).expand(rows, words))
    for lane in range(32):
        for register in range(2 ** len(stored.reg_bases)):
            row, word = places(stored, register, lane)
            same_row, place = places(named, register, lane)
            assert same_row == row
            assert int(labels[row, place]) == word
        # What a 16 x 8 x 16 product wants of a lane: rows lane // 4 and 8 more, columns 2 * (lane % 4) and 8 more.
        first = [places(named, register, lane) for register in range(4)]
        assert first == [(lane // 4 + row, lane % 4 + place) for row, place in ((0, 0), (0, 4), (8, 0), (8, 4))]
        assert [places(stored, register, lane)[1] for register in (0, 1)] == [2 * (lane % 4), 2 * (lane % 4) + 1]  # one load


@pytest.mark.parametrize(("columns", "rows"), [(128, 8), (64, 16)])
def test_lanes_hold_the_x_that_their_products_take(columns: int, rows: int) -> None:
    layout = ampere.x_layout(columns, rows, 4)
    order = ampere._columns_in_halves.fn(torch.arange(columns)[:, None].expand(columns, rows))[:, 0].tolist()
    for lane in range(32):
        found = [places(layout, register, lane) for register in range(4)]
        assert found == [(4 * (lane % 4) + i, lane // 4) for i in range(4)]  # 8 bytes at once
        assert [order.index(column) for column, _ in found] == [2 * (lane % 4) + i for i in (0, 1, 8, 9)]
