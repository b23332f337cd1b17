"""Tile choice: one pure function a kernel, from shapes and `DeviceTraits` to one frozen dataclass.

What was tuned says so in its function. The rest is UNTUNED, chosen by counting (bytes in flight, programs a multiprocessor,
registers) and from machine code without spills in the loop, which `tests/kernels/test_compile.py` keeps so: NVIDIA before
Hopper, RDNA and CDNA ("compiled for"), where the distance from the best is unknown.
`benchmarks/gpu_tiles.py` measures candidates. Kernels accept any legal tiles, so tests and tuners force them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class DeviceTraits:
    """What tile choice may know of a GPU.

    shared_memory: bytes a program can use. rounds_bf16: fp32 becomes bf16, to nearest even, in one instruction.
    ptx: its assembly is PTX. wgmma: products run beside the instructions that follow and read registers meanwhile (Hopper).
    gluon: it is an Ampere GPU or a later one, and this Triton has what `ampere.py` and `hopper.py` are written in.
    """

    vendor: Literal["nvidia", "amd"]
    warp_size: int
    multiprocessors: int
    shared_memory: int
    rounds_bf16: bool
    ptx: bool = False
    wgmma: bool = False
    gluon: bool = False


@dataclass(frozen=True)
class DotTiles:
    """A tile of block_m x block_n outputs on matrix instructions, K in steps of 8 * block_words and in `split_k` parts.

    block_words: 8 (one block of 64 columns), or more where they divide a group. group_n: n-tiles that run together, so that
    the x and weight tiles they share stay in L2.
    scale_sums: scales act on sums of products with integers, where a step lies in one group.
    """

    block_m: int
    block_n: int
    block_words: int
    split_k: int
    group_n: int
    num_warps: int
    num_stages: int
    scale_sums: bool = False

    @property
    def rows(self) -> int:
        """Rows of x a program takes."""
        return self.block_m


@dataclass(frozen=True)
class HopperTiles:
    """A tile of block_m + more_m rows by block_n features for `hopper.py`: K in steps of 64.

    more_m: 0, or a power of two below block_m. num_warps: 4 or 8, 16 features or more each. registers: most of a lane, so
    that more programs fit; 0: what it takes. whole: tiles whose K one program does; of those after them K goes in `split_k`
    parts, so that the last round of programs is full.
    """

    block_m: int
    more_m: int
    block_n: int
    split_k: int
    group_n: int
    num_warps: int
    registers: int = 0
    whole: int = 0

    @property
    def rows(self) -> int:
        """Rows of x a program takes."""
        return self.block_m + self.more_m


@dataclass(frozen=True)
class AmpereTiles:
    """A tile of block_m rows by block_n features for `ampere.py`: K in `split_k` parts, in turns of `depth` steps.

    block_m: 8 or a multiple. block_n: 16 features a warp or a power of two more. block_words: 8 or 16, which lie in one group;
    K is a whole number of turns. registers: most of a lane; 0: what it takes.
    """

    block_m: int
    block_n: int
    block_words: int
    depth: int
    split_k: int
    num_warps: int
    registers: int = 0

    @property
    def rows(self) -> int:
        """Rows of x a program takes."""
        return self.block_m


@dataclass(frozen=True)
class ExpandTiles:
    """block_n rows by block_words words (8 columns each) of the dense weight a program."""

    block_n: int
    block_words: int
    num_warps: int


def decode_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> DotTiles | AmpereTiles:
    """Tiles for `int4_linear`, up to 32 rows: what counts is to read the weight once and to unpack it in few instructions.

    zeros: whether the weight has zero points.
    """
    if m <= 16 and traits.gluon and (group_size == k or group_size % 64 == 0) and k % 64 == 0:
        return ampere_tiles(m, n, k, group_size, traits, zeros)
    return plain_decode_tiles(m, n, k, group_size, traits, zeros)


_AMPERE_SIZES: dict[tuple[bool, bool], tuple[tuple[int, int, tuple[float, ...]], ...]] = {
    (True, False): (
        (64, 72, (0.96, 1.63, 2.05, 2.40, 2.86, 3.16, 3.81)),
        (64, 96, (0.90, 1.45, 1.76, 2.14, 2.60)),
        (64, 128, (0.93, 1.46, 1.73, 2.10)),
    ),
    (True, True): (
        (64, 72, (0.99, 1.69, 2.15, 2.55, 3.13, 3.44, 4.10)),
        (64, 80, (1.45, 1.77, 2.05, 2.51, 3.04, 3.40)),
        (64, 128, (0.97, 1.57, 1.89, 2.27)),
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

Fitted to 420 times of the linears of llama-3.1-8b, qwen3-32b and llama-3.3-70b at M = 8 and 16, those near the best counting
most: H200, 26 November 2026 (`benchmarks/results/h200-int4-variants.json`), root of the mean square 2 to 4 %. They count with
each other, not for themselves.
"""

_TURNS_FILL, _TURNS_SPLIT_US = 0.5, 1.0  # turns to begin and to end with; where K is split


def ampere_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> AmpereTiles:
    """Tiles of `ampere.py` for up to 16 rows, K a multiple of 64: the best by the rounds of programs that they make. K is split
    while all programs run at once; turns go in pairs.

    Of what another run measured (`benchmarks/results/h200-tiles.json`) 0.3 % slower in the mean than the best of up to 32, and
    4 % at most.
    """
    words = 16 if k % 128 == 0 and (group_size == k or group_size % 128 == 0) else 8
    steps, sms = k // (8 * words), traits.multiprocessors
    depth = 2 if steps % 2 == 0 else 1
    turns, found = steps // depth, []
    for block_n, registers, pair_us in _AMPERE_SIZES[m <= 8, zeros]:
        for split in range(1, MOST_PARTS + 1):
            programs, pairs = -(-n // block_n) * split, -(-turns // (2 * split))
            if split == 1 or (turns >= 2 * split and programs <= len(pair_us) * sms):
                us = _rounds_us(programs, pairs, pair_us, sms, _TURNS_FILL) + (_TURNS_SPLIT_US if split > 1 else 0.0)
                found.append((us, block_n, registers, split))
    _, block_n, registers, split = min(found)
    return AmpereTiles(8 if m <= 8 else 16, block_n, words, depth, split, num_warps=4, registers=registers)


def plain_decode_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> DotTiles:
    """Tiles of `fused.py` for `int4_linear`.

    zeros: for these unpacking waits: with them 128 features and 32 rows took 45.7 us for 28672 x 4096, 27.9 without (H200).

    NVIDIA: 64 output features a program, K split until there are about three programs a multiprocessor. H200, the linears of
    llama-3.1-8b, qwen3-32b and llama-3.3-70b, M = 32, 26 November 2026 (`benchmarks/results/h200-tiles.json`): 0.2 % slower in
    the mean than the best of up to 24, 1.6 % at most; with zero points 0.9 and 12 %. Scaling sums took 5 to 14 % less time than
    scaling weights (H100, `h100-tiles-before.json`).
    """
    if traits.vendor == "amd":
        words = _block_words(k, group_size, most=8)
        split = _split_k(-(-n // 32) * -(-m // 16), -(-k // (8 * words)), 3.0 * traits.multiprocessors, least=4)
        stages = _stages(16, 32, words, k, group_size, traits, most=4)
        return DotTiles(16, 32, words, split, group_n=8, num_warps=2, num_stages=stages, scale_sums=True)
    block_m, sms = 8 if m <= 8 else 16 if m <= 16 else 32, traits.multiprocessors
    tiles_m = -(-m // block_m)
    programs = tiles_m * -(-n // 128)
    # 16 rows: 128 features where they are so many; 32: where all programs of 128 run at once, and are not too few.
    wide = m > 8 and (programs >= 3 * sms if m <= 16 else not zeros and 1.5 * sms <= programs <= 3 * sms)
    words = _block_words(k, group_size, most=16)
    block_n, split = 128, 1
    if not wide:
        wanted, least = (3.3, 4) if m <= 16 else (2.9, 8)
        block_n, programs = 64, tiles_m * -(-n // 64)
        split = _split_k(programs, -(-k // (8 * words)), wanted * sms, least=least, of=_SPLITS)
    stages = _stages(block_m, block_n, words, k, group_size, traits, most=4 if m > 16 and wide else 3)
    return DotTiles(block_m, block_n, words, split, group_n=8, num_warps=4, num_stages=stages, scale_sums=True)


def fused_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> DotTiles | HopperTiles:
    """Tiles for `fused_linear`, more than 32 rows: a weight is unpacked once for many rows. zeros: it has zero points."""
    if m > 32 and traits.wgmma and traits.gluon and k % 64 == 0:
        return hopper_tiles(m, n, k, traits, zeros)
    return plain_tiles(m, n, k, group_size, traits, zeros)


def plain_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> DotTiles:
    """Tiles of `fused.py` for `fused_linear`: while a program unpacks, others multiply."""
    if m <= 32:
        return plain_decode_tiles(m, n, k, group_size, traits, zeros)
    # Untuned. Larger tiles spill registers on gfx11; so do these on four warps where there are zero points.
    nvidia = traits.vendor == "nvidia"
    block_m = 128 if m > 64 and (nvidia or traits.warp_size == 64) else 64
    block_n = 128 if nvidia else 64
    split = _split_k(-(-n // block_n) * -(-m // block_m), -(-k // 64), traits.multiprocessors, least=8)
    warps = 8 if block_m * block_n > 8192 or (not nvidia and traits.warp_size == 32) else 4
    stages = _stages(block_m, block_n, 8, k, group_size, traits, most=4)
    return DotTiles(block_m, block_n, 8, split, group_n=8, num_warps=warps, num_stages=stages)


_HOPPER_SIZES: tuple[tuple[HopperTiles, tuple[float, ...], float], ...] = (
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
(`benchmarks/results/h200-tiles.json`), root of the mean square 5 %. They count with each other, not for themselves. The last
are medians of times with zero points.
"""

_FILL = 3  # steps that it takes a program to begin and to end
_LONG = 2e-6  # how much longer steps of 64 features take for each column of K beyond 8192
_SPLIT_US, _PART_US = 3.0, 2e-5  # where K is split: once, and a byte of parts that a multiprocessor writes and reads
_AGAIN_US = 4.0  # where parts run in several rounds: each further one


def hopper_tiles(m: int, n: int, k: int, traits: DeviceTraits, zeros: bool = False) -> HopperTiles:
    """Tiles of `hopper.py` for more than 32 rows, K a multiple of 64: the best by the rounds of programs that they make.

    Of what was measured 0.5 % slower in the mean than the best of up to 40, 6 % at most; with zero points 0.6 and 7 %.
    """
    _, size, parts, whole = min(hopper_candidates(m, n, k, traits, zeros), key=lambda candidate: candidate[0])
    return replace(size, split_k=parts, whole=whole)


def hopper_candidates(
    m: int, n: int, k: int, traits: DeviceTraits, zeros: bool = False
) -> Iterator[tuple[float, HopperTiles, int, int]]:
    """(microseconds by the model, size, `split_k`, `whole`) of what may be good for `hopper.py`.

    K is split for all tiles, where there are few, or for those of the last round or two, which would not fill it.
    """
    sms, steps = traits.multiprocessors, k // 64
    for size, alone_us, slower in _HOPPER_SIZES:
        if size.rows < 128 and m > 3 * size.rows:
            continue
        slower = (slower if zeros else 1.0) * (1 + _LONG * max(0, k - 8192) if size.block_n == 64 else 1.0)
        step_us = tuple(us * slower for us in alone_us)
        tiles, at_once = -(-m // size.rows) * -(-n // size.block_n), len(step_us) * sms
        yield _rounds_us(tiles, steps, step_us, sms, _FILL), size, 1, 0
        full = tiles - tiles % at_once
        for whole, parts in itertools.product(sorted({w for w in (0, full - at_once, full) if 0 <= w < tiles}), _SPLITS[1:]):
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


def expand_tiles(n: int, k: int, group_size: int, traits: DeviceTraits) -> ExpandTiles:
    """Tiles for `expand`: 16 bytes of words a lane.

    H200, 28672 x 4096, 24 November 2026 (`benchmarks/results/h200-expand.json`): 0.7 % slower than the best of eight.
    """
    words = _block_words(k, group_size, most=16)
    return ExpandTiles(16 * traits.warp_size // words, words, num_warps=4)


def _block_words(k: int, group_size: int, *, most: int) -> int:
    """Words of a step of K: up to `most`, a power of two, within one group; 8 (a block of 64 columns) fits every group."""
    words = 8
    while 2 * words <= most and (group_size == k or group_size % (16 * words) == 0):
        words *= 2
    return words


_DOUBLED = (1, 2, 4, 8, 16)
_SPLITS = (1, 2, 3, 4, 6, 8)
MOST_PARTS = _SPLITS[-1]
"""Of K, for `ampere.py` and `hopper.py`."""


def _split_k(programs: int, steps: int, wanted: float, *, least: int, of: tuple[int, ...] = _DOUBLED) -> int:
    """Parts of K: `of` these few, which bounds compilations, so that `wanted` programs run, each with `least` steps or more."""
    split = 1
    for more in of[1:]:
        if programs * split >= wanted or steps // more < least:
            break
        split = more
    return split


def _stages(block_m: int, block_n: int, words: int, k: int, group_size: int, traits: DeviceTraits, *, most: int) -> int:
    """Steps of K in flight: up to `most` that fit shared memory. AMD keeps them in registers: 2."""
    if traits.vendor == "amd":
        return 2 if group_size % 128 == 0 and k % 128 == 0 else 1
    step = words * 4 * block_n + 8 * words * 2 * block_m
    return max(2, min(most, (traits.shared_memory - 32768) // step))
