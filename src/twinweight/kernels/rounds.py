"""Tiles by the rounds of programs that they make, for kernels in Gluon: models of the time, fitted to an H200."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from .forms import MOST_PARTS, SPLITS, AmpereTiles, DeviceTraits, HopperFewTiles, HopperTiles

Size = TypeVar("Size", AmpereTiles, HopperFewTiles, HopperTiles)

_AMPERE_SIZES: dict[tuple[bool, bool], tuple[tuple[int, int, tuple[float, ...]], ...]] = {
    (True, False): (
        (64, 72, (1.17, 1.81, 2.20, 2.57, 3.02, 3.50, 4.15)),
        (64, 96, (1.30, 1.61, 1.95, 2.39, 2.90)),
        (64, 128, (1.20, 1.69, 1.95, 2.39)),
    ),
    (True, True): (
        (64, 72, (1.38, 2.06, 2.44, 2.75, 3.27, 3.77, 4.41)),
        (64, 80, (1.23, 1.92, 2.30, 2.65, 3.22, 3.59)),
        (64, 128, (1.20, 1.61, 1.96, 2.44)),
    ),
    (False, False): (
        (64, 96, (1.19, 2.03, 2.59, 3.01, 3.55)),
        (64, 128, (1.28, 2.03, 2.40, 2.83)),
        (64, 160, (1.36, 1.94, 2.34)),
        (128, 128, (2.26, 3.57, 4.23, 5.19)),
    ),
    (False, True): (
        (64, 96, (1.08, 1.97, 2.65, 3.12, 3.75)),
        (64, 128, (1.24, 1.98, 2.38, 2.90)),
        (64, 160, (1.29, 1.77, 2.26)),
    ),
}
"""(Up to 8 rows, zero points) -> features and registers of tiles of `ampere.py`, and microseconds of two turns of 256 columns
where 1, 2, ... programs share a multiprocessor, which holds as many as there are values.

Those of up to 8 rows and of `hopper_few.py` are fitted to 900 times of the linears of llama-3.1-8b, qwen3-32b and
llama-3.3-70b, those near the best counting most: H200, 30 November 2026 (`benchmarks/results/h200-tiles.json`), root of the
mean square 2 to 3 %. For 128 registers and one program there was no time, and 1.20 is a guess. The rest, which Hopper does not
take, is fitted to 200 times of 26 November. They count with each other, not for themselves: a launch takes 2 to 3 us more.
"""

_HOPPER_FEW_SIZES: dict[bool, tuple[tuple[int, int, tuple[float, ...]], ...]] = {
    False: ((64, 96, (1.21, 1.66, 2.08, 2.59, 3.16)), (64, 112, (1.16, 1.67, 2.06, 2.60))),
    True: ((64, 96, (1.19, 1.80, 2.34, 2.88, 3.48)), (64, 112, (1.19, 1.70, 2.21, 2.74))),
}
"""Zero points -> the same of `hopper_few.py`."""

_TURNS_FILL, _TURNS_SPLIT_US = 0.5, 0.8  # pairs of turns to begin and to end with; where K is split
_LONGER = 0.25  # how much of the longer parts' further pair counts, beside that of the mean


def ampere_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> AmpereTiles:
    """Tiles of `ampere.py` for up to 16 rows, K a multiple of 64: the best by the rounds of programs that they make. K is split
    while all programs run at once; turns go in pairs.

    Of the times fitted to, up to 8 rows take 0.6 % more in the mean than the best of up to 32, and 2 % at most; with zero
    points 1.1 and 5 %.
    """
    return _best(ampere_candidates(m, n, k, group_size, traits, zeros))


def ampere_candidates(
    m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False
) -> Iterator[tuple[float, AmpereTiles, int, int]]:
    """(microseconds by the model, size, `split_k`, `whole`) of what may be good for `ampere.py`."""
    words = 16 if k % 128 == 0 and (group_size == k or group_size % 128 == 0) else 8
    steps = k // (8 * words)
    depth = 2 if steps % 2 == 0 else 1
    for block_n, registers, pair_us in _AMPERE_SIZES[m <= 8, zeros]:
        size = AmpereTiles(8 if m <= 8 else 16, block_n, words, depth, 1, 4, registers)
        for us, split, whole in _divided(-(-n // block_n), steps // depth, pair_us, traits.multiprocessors):
            yield us, size, split, whole


def hopper_few_tiles(n: int, k: int, traits: DeviceTraits, zeros: bool = False) -> HopperFewTiles:
    """Tiles of `hopper_few.py` for 9 to 16 rows, K a multiple of 64, by the same model.

    Of the times fitted to they take 1.0 % more in the mean than the best of up to 16, and 4 % at most; with zero points 0.7
    and 3 %.
    """
    return _best(hopper_few_candidates(n, k, traits, zeros))


def hopper_few_candidates(
    n: int, k: int, traits: DeviceTraits, zeros: bool = False
) -> Iterator[tuple[float, HopperFewTiles, int, int]]:
    """(microseconds by the model, size, `split_k`, `whole`) of what may be good for `hopper_few.py`."""
    depth = next(depth for depth in (4, 2, 1) if k % (64 * depth) == 0)
    for block_n, registers, pair_us in _HOPPER_FEW_SIZES[zeros]:
        size = HopperFewTiles(16, block_n, 8, depth, 1, 4, registers)
        for us, split, whole in _divided(-(-n // block_n), k // (64 * depth), pair_us, traits.multiprocessors):
            yield us, size, split, whole


def _best(candidates: Iterable[tuple[float, Size, int, int]]) -> Size:
    """The tiles of least time by the model."""
    _, size, split, whole = min(candidates, key=lambda candidate: candidate[0])
    return replace(size, split_k=split, whole=whole)


def _divided(tiles: int, turns: int, pair_us: tuple[float, ...], sms: int) -> Iterator[tuple[float, int, int]]:
    """(microseconds, `split_k`, `whole`) of the ways to divide K: for no tile, for all, or for those that would leave the
    multiprocessors with unequal numbers of whole ones. What is split runs at once with the last whole tiles.
    """
    most, pairs = len(pair_us), -(-turns // 2)
    rounds, left = divmod(tiles, most * sms)
    yield (pairs + _TURNS_FILL) * (rounds * pair_us[-1] + _shared_us(pair_us, left / sms, 0.75)), 1, 0
    wholes = (whole for whole in range(0, tiles, sms) if tiles - whole <= most * sms)
    for whole, split in itertools.product(wholes, range(2, MOST_PARTS + 1)):
        rounds, before = divmod(whole // sms, most)
        parts, part = (tiles - whole) * split / sms, _LONGER * -(-pairs // split) + (1 - _LONGER) * pairs / split
        if turns >= 2 * split and before + parts <= most:
            us = rounds * (pairs + _TURNS_FILL) * pair_us[-1] + (part + _TURNS_FILL) * _shared_us(pair_us, before + parts, 0.5)
            yield us + (pairs - part) * _shared_us(pair_us, before, 0.5) + _TURNS_SPLIT_US, split, whole


def _shared_us(pair_us: tuple[float, ...], programs: float, fullest: float) -> float:
    """Microseconds of a pair of turns where so many programs share a multiprocessor, between those of the mean and, to a part
    of `fullest`, of the one that has most.
    """
    at = max(1.0, programs + fullest * (math.ceil(programs) - programs))
    low = pair_us[int(at) - 1]
    return (low + (at % 1) * (pair_us[math.ceil(at) - 1] - low)) * (programs > 0)


_HOPPER_SIZES: tuple[tuple[HopperTiles, tuple[float, ...], float], ...] = (
    (HopperTiles(32, 0, 64, 1, 8, 4, 96), (0.23, 0.322, 0.366, 0.478, 0.503), 1.08),
    (HopperTiles(32, 16, 64, 1, 8, 4, 128), (0.257, 0.302, 0.398, 0.527), 1.05),
    (HopperTiles(32, 16, 128, 1, 8, 8, 128), (0.326, 0.521), 1.04),
    (HopperTiles(64, 0, 64, 1, 8, 4, 128), (0.255, 0.315, 0.420, 0.552), 1.05),
    (HopperTiles(64, 0, 128, 1, 8, 8, 128), (0.330, 0.521), 1.05),
    (HopperTiles(64, 32, 64, 1, 8, 4, 168), (0.299, 0.375, 0.543), 1.04),
    (HopperTiles(64, 32, 128, 1, 8, 8, 128), (0.375, 0.685), 1.09),
    (HopperTiles(128, 0, 64, 1, 8, 4, 168), (0.312, 0.424, 0.634), 1.07),
    (HopperTiles(128, 0, 128, 1, 8, 8, 0), (0.402,), 1.05),
    (HopperTiles(128, 0, 256, 1, 8, 8, 0), (0.757,), 1.28),
    (HopperTiles(128, 64, 64, 1, 8, 4, 0), (0.352, 0.593), 1.04),
    (HopperTiles(128, 64, 128, 1, 8, 8, 0), (0.553,), 1.02),
    (HopperTiles(256, 0, 128, 1, 8, 8, 0), (0.728,), 1.03),
)
"""Sizes of tiles for `hopper.py`, microseconds of a step of 64 columns where 1, 2, ... programs share a multiprocessor, which
holds as many as there are values, and how many times as long a step takes with zero points.

Fitted to 850 times of the linears of llama-3.1-8b, qwen3-32b and llama-3.3-70b at M = 48 to 512: H200, 26 November 2026
(`benchmarks/results/h200-tiles.json`), root of the mean square 5 %; the first to 356 at M = 32, 30 November, 4 %.
They count with each other, not for themselves. The last are medians of times with zero points.
"""

_FILL = 3  # steps that it takes a program to begin and to end
_LONG = 2e-6  # how much longer steps of 64 features take for each column of K beyond 8192
_SPLIT_US, _PART_US = 3.0, 2e-5  # where K is split: once, and a byte of parts that a multiprocessor writes and reads
_AGAIN_US = 4.0  # where parts run in several rounds: each further one


def hopper_tiles(m: int, n: int, k: int, traits: DeviceTraits, zeros: bool = False) -> HopperTiles:
    """Tiles of `hopper.py` for more than 16 rows, K a multiple of 64: the best by the rounds of programs that they make.

    Of what was measured 0.5 % slower in the mean than the best of up to 40, 6 % at most; with zero points 0.6 and 7 %.
    """
    return _best(hopper_candidates(m, n, k, traits, zeros))


def hopper_candidates(
    m: int, n: int, k: int, traits: DeviceTraits, zeros: bool = False
) -> Iterator[tuple[float, HopperTiles, int, int]]:
    """(microseconds by the model, size, `split_k`, `whole`) of what may be good for `hopper.py`.

    K is split for all tiles, where there are few, or for those of the last round or two, which would not fill it.
    """
    sms, steps = traits.multiprocessors, k // 64
    for size, alone_us, slower in _HOPPER_SIZES:
        if size.rows < 128 and m > size.rows * (1 if size.rows == 32 else 3):
            continue
        slower = (slower if zeros else 1.0) * (1 + _LONG * max(0, k - 8192) if size.block_n == 64 else 1.0)
        step_us = tuple(us * slower for us in alone_us)
        tiles, at_once = -(-m // size.rows) * -(-n // size.block_n), len(step_us) * sms
        yield _rounds_us(tiles, steps, step_us, sms, _FILL), size, 1, 0
        full = tiles - tiles % at_once
        for whole, parts in itertools.product(sorted({w for w in (0, full - at_once, full) if 0 <= w < tiles}), SPLITS[1:]):
            programs = (tiles - whole) * parts
            if steps >= 4 * parts and programs <= 4 * at_once:
                part = 2 * -(-steps // (2 * parts))  # each begins with an even step
                rounds = _rounds_us(whole, steps, step_us, sms, _FILL) + _rounds_us(programs, part, step_us, sms, _FILL)
                summing = _SPLIT_US + _PART_US * 4 * size.rows * size.block_n * (parts + programs / sms)
                again = _AGAIN_US * (-(-programs // at_once) - 1)
                yield rounds + summing + again, size, parts, whole


def _rounds_us(programs: int, steps: int, step_us: tuple[float, ...], multiprocessors: int, fill: float) -> float:
    """Microseconds of the rounds in which programs of equal length run, each `fill` steps longer than its own."""
    rounds, left = divmod(programs, len(step_us) * multiprocessors)
    last = step_us[-(-left // multiprocessors) - 1] if left else 0.0
    return (steps + fill) * (rounds * step_us[-1] + last)
