"""Tile choice: one pure function a kernel, from shapes and `DeviceTraits` to one frozen dataclass.

What was tuned says so in its function. The rest is UNTUNED, chosen by counting (bytes in flight, programs a multiprocessor,
registers) and from machine code without spills in the loop, which `tests/kernels/test_compile.py` keeps so: NVIDIA before
Hopper, RDNA and CDNA ("compiled for"), where the distance from the best is unknown.
`benchmarks/gpu_tiles.py` measures candidates. Kernels accept any legal tiles, so tests and tuners force them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DeviceTraits:
    """What tile choice may know of a GPU.

    shared_memory: bytes a program can use. rounds_bf16: fp32 becomes bf16, to nearest even, in one instruction.
    ptx: its assembly is PTX. wgmma: products run beside the instructions that follow and read registers meanwhile (Hopper).
    gluon: `hopper.py` runs on it.
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
    """A tile of block_m + more_m rows by block_n features for `hopper.py`: K in steps of 64 and in `split_k` parts.

    more_m: 0, or a power of two below block_m. num_warps: 4 or 8, 16 features or more each.
    """

    block_m: int
    more_m: int
    block_n: int
    split_k: int
    group_n: int
    num_warps: int

    @property
    def rows(self) -> int:
        """Rows of x a program takes."""
        return self.block_m + self.more_m


@dataclass(frozen=True)
class ExpandTiles:
    """block_n rows by block_words words (8 columns each) of the dense weight a program."""

    block_n: int
    block_words: int
    num_warps: int


def decode_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> DotTiles:
    """Tiles for `int4_linear`, up to 32 rows: what counts is to read the weight once and to unpack it in few instructions.

    NVIDIA: 64 output features a program, K split until there are about three programs a multiprocessor. H200, the linears of
    llama-3.1-8b, qwen3-32b and llama-3.3-70b, M = 1, 16 and 32, 26 November 2026 (`benchmarks/results/h200-tiles.json`):
    1.1 % slower in the mean than the best of up to 36, 6 % at most. Scaling sums took 5 to 14 % less time than scaling
    weights (H100, `h100-tiles-before.json`).
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
    wide = m > 8 and (programs >= 3 * sms if m <= 16 else 1.5 * sms <= programs <= 3 * sms)
    words = _block_words(k, group_size, most=16)
    block_n, split = 128, 1
    if not wide:
        wanted, least = (3.3, 4) if m <= 16 else (2.9, 8)
        block_n, programs = 64, tiles_m * -(-n // 64)
        split = _split_k(programs, -(-k // (8 * words)), wanted * sms, least=least, of=_SPLITS)
    stages = _stages(block_m, block_n, words, k, group_size, traits, most=4 if m > 16 and wide else 3)
    return DotTiles(block_m, block_n, words, split, group_n=8, num_warps=4, num_stages=stages, scale_sums=True)


def fused_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> DotTiles | HopperTiles:
    """Tiles for `fused_linear`, more than 32 rows: a weight is unpacked once for many rows."""
    if m > 32 and traits.gluon and k % 64 == 0:
        return hopper_tiles(m, n, k, traits)
    return plain_tiles(m, n, k, group_size, traits)


def plain_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> DotTiles:
    """Tiles of `fused.py` for `fused_linear`: while a program unpacks, others multiply."""
    if m <= 32:
        return decode_tiles(m, n, k, group_size, traits)
    # Untuned. Larger tiles spill registers on gfx11; so do these on four warps where there are zero points.
    nvidia = traits.vendor == "nvidia"
    block_m = 128 if m > 64 and (nvidia or traits.warp_size == 64) else 64
    block_n = 128 if nvidia else 64
    split = _split_k(-(-n // block_n) * -(-m // block_m), -(-k // 64), traits.multiprocessors, least=8)
    warps = 8 if block_m * block_n > 8192 or (not nvidia and traits.warp_size == 32) else 4
    stages = _stages(block_m, block_n, 8, k, group_size, traits, most=4)
    return DotTiles(block_m, block_n, 8, split, group_n=8, num_warps=warps, num_stages=stages)


def hopper_tiles(m: int, n: int, k: int, traits: DeviceTraits) -> HopperTiles:
    """Tiles of `hopper.py` for more than 32 rows, K a multiple of 64.

    A tile of 256 x 128 copies the fewest bytes a product, but there is one a multiprocessor: it is taken where few of them
    are left without one at the end. Else 64 or 128 features, by how full the last round is. K is split where there
    would be too few programs. H200, the linears of llama-3.1-8b, qwen3-32b and llama-3.3-70b, M = 64, 96, 128, 192, 256, 512,
    26 November 2026 (`benchmarks/results/h200-tiles.json`): 1.3 % slower in the mean than the best of up to 36, 12 % at most.
    """
    steps, sms = k // 64, traits.multiprocessors
    if m <= 192:
        sizes = [(32, 16), (64, 0), (64, 32), (128, 0), (128, 64)]
        block_m, more_m = next(size for size in sizes if sum(size) >= m)
    else:  # the fewest rows past the end
        block_m, more_m = min([(128, 64), (128, 0)], key=lambda size: -(-m // sum(size)) * sum(size))
    rows = block_m + more_m
    tiles_m = -(-m // rows)
    if m > 192 and -(-m // 256) * 256 <= tiles_m * rows:
        programs = -(-m // 256) * -(-n // 128)
        for split in _SPLITS[:4]:
            part = steps // split  # of few programs a long one is split further
            if part >= 56 and (part <= 256 or programs >= 4 * sms) and _filled(programs * split, sms) >= 0.9:
                return HopperTiles(256, 0, 128, split, group_n=8, num_warps=8)
    narrow, wide = tiles_m * -(-n // 64), tiles_m * -(-n // 128)
    if rows in (96, 128) and narrow >= 1.8 * sms and 1.08 * _filled(wide, 2 * sms) > _filled(narrow, 3 * sms):
        return HopperTiles(block_m, more_m, 128, 1, group_n=8, num_warps=8)
    if rows <= 64:
        split = _split_k(narrow, steps, 3.3 * sms, least=16, of=_SPLITS)
    elif rows == 192:
        split = _split_k(narrow, steps, 1.6 * sms, least=28 if 2 * narrow <= sms else 40, most=2 * sms, of=_SPLITS)
    else:
        split = _split_k(narrow, steps, 1.8 * sms, least=28 if m <= 192 else 48, of=_SPLITS)
    return HopperTiles(block_m, more_m, 64, split, group_n=8, num_warps=4)


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


def _split_k(
    programs: int, steps: int, wanted: float, *, least: int, most: float = math.inf, of: tuple[int, ...] = _DOUBLED
) -> int:
    """Parts of K: `of` these few, which bounds compilations, so that `wanted` programs run, but not more than `most`, each
    with `least` steps or more.
    """
    split = 1
    for more in of[1:]:
        if programs * split >= wanted or steps // more < least or programs * more > most:
            break
        split = more
    return split


def _filled(programs: int, at_once: int) -> float:
    """How full the rounds are in which `programs` run, `at_once` a round."""
    return programs / (at_once * -(-programs // at_once))


def _stages(block_m: int, block_n: int, words: int, k: int, group_size: int, traits: DeviceTraits, *, most: int) -> int:
    """Steps of K in flight: up to `most` that fit shared memory. AMD keeps them in registers: 2."""
    if traits.vendor == "amd":
        return 2 if group_size % 128 == 0 and k % 128 == 0 else 1
    step = words * 4 * block_n + 8 * words * 2 * block_m
    return max(2, min(most, (traits.shared_memory - 32768) // step))
