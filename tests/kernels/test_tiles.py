"""Tile choice: legal for every shape, and as near to the best measured as its docstrings say."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from twinweight.kernels.forms import MOST_PARTS, DeviceTraits, DotTiles, FewTiles, HopperFewTiles, HopperTiles
from twinweight.kernels.launch import COUNTERS
from twinweight.kernels.tiles import decode_tiles, fused_tiles
from twinweight.kernels.unpack import check_turns

H200 = DeviceTraits("nvidia", 32, 132, 232448, rounds_bf16=True, ptx=True, wgmma=True, gluon=True)
A100 = DeviceTraits("nvidia", 32, 108, 166912, rounds_bf16=True, ptx=True, gluon=True)
OLDER = DeviceTraits("nvidia", 32, 108, 166912, rounds_bf16=True, ptx=True)
STRIX = DeviceTraits("amd", 32, 40, 65536, rounds_bf16=False)
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-tiles.json"


def is_power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


@given(
    m=st.integers(1, 20000), n=st.integers(1, 130000), blocks=st.integers(1, 900), group=st.sampled_from([32, 64, 128, 0]),
    odd=st.sampled_from([0, 32]), traits=st.sampled_from([H200, A100, OLDER, STRIX]), decode=st.booleans(), zeros=st.booleans(),
)  # fmt: skip
# More tiles than counters: not all may have K split.
@example(m=17281, n=15361, blocks=129, group=128, odd=0, traits=H200, decode=False, zeros=False)
def test_tiles_are_legal(
    m: int, n: int, blocks: int, group: int, odd: int, traits: DeviceTraits, decode: bool, zeros: bool
) -> None:
    k = 128 * blocks + odd
    group_size = group if group and k % group == 0 else k
    t = (decode_tiles if decode else fused_tiles)(m, n, k, group_size, traits, zeros)
    steps = -(-k // (64 if isinstance(t, HopperTiles) else 8 * t.block_words))
    assert 1 <= t.split_k <= steps
    split = -(-m // t.rows) * -(-n // t.block_n) - (0 if isinstance(t, DotTiles) else t.whole)
    assert 1 <= split <= (COUNTERS if t.split_k > 1 else split)
    assert is_power_of_two(t.block_m)
    assert is_power_of_two(t.block_n)
    if isinstance(t, FewTiles):
        assert traits.wgmma if isinstance(t, HopperFewTiles) else traits.gluon
        assert decode
        assert m <= t.block_m
        assert t.block_n >= 16 * t.num_warps
        assert t.whole == 0 or t.split_k > 1
        assert t.split_k <= MOST_PARTS
        assert check_turns(t.block_words, t.depth, t.split_k, k, 0 if group_size == k else group_size) >= t.split_k
    elif isinstance(t, HopperTiles):
        assert traits.wgmma
        assert traits.gluon
        assert k % 64 == 0
        assert m > 16
        assert t.more_m == 0 or (is_power_of_two(t.more_m) and t.more_m < t.block_m)
        assert t.rows * t.block_n // t.num_warps <= 4096  # sums of 128 registers a lane
        assert t.block_n >= 16 * t.num_warps
        assert t.split_k <= MOST_PARTS
        assert t.registers % 8 == 0
    else:
        assert t.block_words == 8 or group_size == k or group_size % (8 * t.block_words) == 0


def test_hopper_tiles_need_gluon() -> None:
    without = DeviceTraits("nvidia", 32, 132, 232448, rounds_bf16=True, ptx=True, wgmma=True)
    assert isinstance(fused_tiles(512, 4096, 4096, 128, without), DotTiles)
    assert isinstance(fused_tiles(512, 4096, 4096, 128, H200), HopperTiles)
    assert isinstance(fused_tiles(512, 4096, 4128, 32, H200), DotTiles)


@pytest.mark.parametrize(
    ("symmetric", "rows", "mean", "worst"),
    [
        (True, (8, 16), 1.009, 1.05), (True, (32, 32), 1.007, 1.065), (True, (48, 512), 1.006, 1.065),
        (False, (8, 16), 1.01, 1.05), (False, (32, 32), 1.012, 1.065), (False, (48, 512), 1.007, 1.07),
    ],
)  # fmt: skip
def test_as_near_to_the_best_as_is_said(symmetric: bool, rows: tuple[int, int], mean: float, worst: float) -> None:
    """Of what was measured on an H200."""
    times: dict[tuple[int, int, int], dict[tuple[object, ...], float]] = defaultdict(dict)
    for r in json.loads(MEASURED.read_text())["records"]:
        if rows[0] <= r["m"] <= rows[1] and r["symmetric"] == symmetric:
            times[r["n"], r["k"], r["m"]][tuple(r["tiles"].values())] = r["time_us"]
    losses = []
    for (n, k, m), found in times.items():
        chosen = (decode_tiles if m <= 32 else fused_tiles)(m, n, k, 128, H200, not symmetric)
        losses.append(found[tuple(vars(chosen).values())] / min(found.values()))
    assert len(losses) >= 12
    assert math.exp(math.fsum(map(math.log, losses)) / len(losses)) <= mean
    assert max(losses) <= worst
