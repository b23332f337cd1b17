"""Tile choice: one pure function a kernel, from shapes and `DeviceTraits` to one frozen dataclass.

What was tuned says so in its function. The rest is UNTUNED, chosen by counting (bytes in flight, programs a multiprocessor,
registers) and from machine code without spills in the loop, which `tests/kernels/test_compile.py` keeps so: NVIDIA before
Hopper, RDNA and CDNA ("compiled for"), where the distance from the best is unknown.
`benchmarks/gpu_tiles.py` measures candidates. Kernels accept any legal tiles, so tests and tuners force them.
"""

from __future__ import annotations

from .forms import SPLITS, AmpereTiles, DeviceTraits, DotTiles, ExpandTiles, HopperFewTiles, HopperTiles
from .rounds import ampere_tiles, hopper_few_tiles, hopper_tiles


def decode_tiles(
    m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False
) -> DotTiles | AmpereTiles | HopperTiles | HopperFewTiles:
    """Tiles for `int4_linear`, up to 32 rows: what counts is to read the weight once and to unpack it in few instructions.
    More rows, which are those of `fused`, take tiles for few: so that nobody times two names of one kernel.

    zeros: whether the weight has zero points.
    """
    if m <= 16 and traits.gluon and (group_size == k or group_size % 64 == 0) and k % 64 == 0:
        if m > 8 and traits.wgmma:
            return hopper_few_tiles(n, k, traits, zeros)
        return ampere_tiles(m, n, k, group_size, traits, zeros)
    return (fused_tiles if 16 < m <= 32 else plain_decode_tiles)(m, n, k, group_size, traits, zeros)


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
        split = _split_k(programs, -(-k // (8 * words)), wanted * sms, least=least, of=SPLITS)
    stages = _stages(block_m, block_n, words, k, group_size, traits, most=4 if m > 16 and wide else 3)
    return DotTiles(block_m, block_n, words, split, group_n=8, num_warps=4, num_stages=stages, scale_sums=True)


def fused_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits, zeros: bool = False) -> DotTiles | HopperTiles:
    """Tiles for `fused_linear`: a weight is unpacked once for many rows. zeros: it has zero points.

    From 17 to 32 rows `fused.py` takes less time for a short K without zero points: of 12 linears of llama-3.1-8b, qwen3-32b
    and llama-3.3-70b the three with K = 4096 (0.94 to 0.98x; the others 0.97 to 1.16x; with zero points 4096 x 4096).
    """
    if m > 16 and traits.wgmma and traits.gluon and k % 64 == 0 and (m > 32 or zeros or k > 4096):
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
