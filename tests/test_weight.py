"""`Int4Weight` against plain loops, ragged sizes included."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.formats.writers import QuantCase, random_case
from twinweight.weight import Int4Weight, concat_rows, from_values, pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    group_size: int | None
    symmetric: bool = True
    act_order: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case(1, 1, None),
    Case(3, 7, None, symmetric=False),
    Case(17, 96, 32),
    Case(24, 128, 64, symmetric=False, dtype=torch.float16),
    Case(5, 384, 128, act_order=True),
    Case(9, 160, 32, symmetric=False, act_order=True, dtype=torch.float16),
    Case(8, 101, None, dtype=torch.float16),
]


def plain(case: Case) -> QuantCase:
    return random_case(case.n, case.k, case.group_size, symmetric=case.symmetric, act_order=case.act_order, dtype=case.dtype)


def weight(q: QuantCase) -> Int4Weight:
    return from_values(q.values, q.scales, q.zeros, q.g_idx, group_size=q.group_size or q.shape[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequantize_is_the_definition(case: Case) -> None:
    q = plain(case)
    w = weight(q)
    assert w.shape == (case.n, case.k)
    assert torch.equal(w.values(), q.values)
    assert torch.equal(w.dequantize(), q.dense())
    assert torch.equal(w.dequantize(torch.float64), q.dense(torch.float64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_and_concat_are_inverse(case: Case) -> None:
    w = weight(plain(case))
    cut = case.n // 2
    joined = concat_rows([w.rows(0, cut), w.rows(cut, case.n)])
    assert torch.equal(joined.packed, w.packed)
    assert torch.equal(joined.dequantize(), w.dequantize())


def test_packing_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    values = random_case(13, 203, None).values
    signed = (values.to(torch.int16) - 8).to(torch.int8)
    assert torch.equal(pack_nibbles(values), pack_to_int32(signed, 4))
    assert torch.equal(unpack_nibbles(pack_nibbles(values))[:, :203], values)
    assert torch.equal(unpack_nibbles(pack_nibbles(values[:8].t())), values[:8].t())
    assert torch.equal(unpack_from_int32(pack_nibbles(values), 4, torch.Size((13, 203))), signed)


def test_an_ordered_g_idx_is_dropped() -> None:
    q = random_case(4, 64, 32)
    assert weight(replace(q, g_idx=torch.arange(64, dtype=torch.int32) // 32)).g_idx is None


def test_to_rounds_scales_once_and_keeps_the_rest() -> None:
    w = weight(random_case(4, 64, 32, symmetric=False))
    moved = w.to("cpu", torch.float16)
    assert torch.equal(moved.scales, w.scales.to(torch.float16))
    assert moved.packed is w.packed
    assert w.nbytes == 4 * 8 * 4 + 4 * 2 * 2 + 4 * 2


OTHERS = {
    "K": random_case(4, 96, 32),
    "group size": random_case(4, 64, 64),
    "symmetry": random_case(4, 64, 32, symmetric=False),
    "order": random_case(4, 64, 32, act_order=True),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_cannot_be_joined_is_refused(other: QuantCase) -> None:
    with pytest.raises(ValueError, match="cannot join"):
        concat_rows([weight(random_case(4, 64, 32)), weight(other)])
