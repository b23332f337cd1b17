"""Tile choice: one pure function a kernel, from shapes and `DeviceTraits` to one frozen dataclass.

Provenance of every number here: UNTUNED (November 2026). Chosen by counting (bytes in flight, programs a multiprocessor,
registers) and compiled with Triton 3.7.1 for cuda 80/90/100 and gfx942/1100/1151/1201 without register spills, which
`tests/kernels/test_compile.py` keeps so. Nothing was measured: distance from the best is unknown on every GPU. To be
measured on an H200; RDNA and CDNA remain "compiled for". Kernels accept any legal tiles, so tests and tuners force them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DeviceTraits:
    """What tile choice may know of a GPU.

    shared_memory: bytes a program can use. rounds_bf16: fp32 becomes bf16, to nearest even, in one instruction.
    tensor_memory: products accumulate in a memory of their own (Blackwell), not in registers.
    """

    vendor: Literal["nvidia", "amd"]
    warp_size: int
    multiprocessors: int
    shared_memory: int
    rounds_bf16: bool
    tensor_memory: bool = False


@dataclass(frozen=True)
class GemvTiles:
    """One row of x at a time: block_n output features by block_words packed words (8 columns each), `split_k` parts of K."""

    block_n: int
    block_words: int
    split_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DotTiles:
    """A tile of block_m x block_n outputs on matrix instructions, K in steps of 8 * block_words (>= 16 words).

    group_n: n-tiles that run together, so that the x and weight tiles they share stay in L2.
    sort_x: reorder x once in a pass of its own (many rows), not in registers in the inner loop (few rows).
    """

    block_m: int
    block_n: int
    block_words: int
    split_k: int
    group_n: int
    sort_x: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandTiles:
    """block_n rows by block_words words (8 columns each) of the dense weight a program."""

    block_n: int
    block_words: int
    num_warps: int


def decode_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> GemvTiles | DotTiles:
    """Tiles for `int4_linear`: reductions for one row, matrix instructions (rows padded to 16) from two.

    Two rows already pay for the padding: what bounds a GPU at small M is reading and unpacking the weight, and the GEMV
    kernel does that once a row. Untuned (see the module docstring).
    """
    words = -(-k // 8)
    nvidia = traits.vendor == "nvidia"
    if m <= 1:
        split = _split_k(-(-n // 16), -(-words // 64), 8 * traits.multiprocessors, least=2)
        # With one stage AMD keeps what is in flight in registers; two or more cost it 250 of them and bring nothing more.
        return GemvTiles(block_n=16, block_words=64, split_k=split, num_warps=4, num_stages=3 if nvidia else 1)
    block_m, block_n = 16 if m <= 16 else 32, 64 if nvidia else 32
    programs = -(-n // block_n) * -(-m // block_m)
    split = _split_k(programs, -(-words // 16), 4 * traits.multiprocessors, least=8)
    stages = _stages(block_m, block_n, k, group_size, traits)
    return DotTiles(block_m, block_n, 16, split, group_n=8, sort_x=False, num_warps=4 if nvidia else 2, num_stages=stages)


def fused_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> DotTiles:
    """Tiles for `fused_linear`, 32 rows and more. Untuned (see the module docstring)."""
    words = -(-k // 8)
    if m <= 32:
        tiles = decode_tiles(max(m, 2), n, k, group_size, traits)
        if isinstance(tiles, DotTiles):
            return tiles
    block_m, block_n = 64 if m <= 64 else 128, 128
    if traits.vendor == "amd" or traits.tensor_memory:
        # AMD: larger tiles spill registers on gfx11. Tensor memory: Triton 3.7 gives each of the eight products of a step
        # its own accumulator, and 512 columns hold eight of 64 x 64, no more (beyond that the kernel is one trap).
        block_m, block_n = 64, 64
    programs = -(-n // block_n) * -(-m // block_m)
    split = _split_k(programs, -(-words // 16), traits.multiprocessors, least=8)
    warps, stages = 8 if block_m * block_n > 8192 else 4, _stages(block_m, block_n, k, group_size, traits)
    return DotTiles(block_m, block_n, 16, split, group_n=8, sort_x=True, num_warps=warps, num_stages=stages)


def expand_tiles(n: int, k: int, group_size: int, traits: DeviceTraits) -> ExpandTiles:
    """Tiles for `expand`: 16-byte stores, whole cache lines, one group a tile where groups allow. Untuned (see above)."""
    block_words = 64 if group_size == k else 16
    return ExpandTiles(1024 // block_words, block_words, num_warps=4)


def _split_k(programs: int, steps: int, wanted: int, *, least: int) -> int:
    """Parts of K so that `wanted` programs run, each with `least` steps or more; a power of two to bound compilations."""
    split = 1
    while programs * split < wanted and steps // (2 * split) >= least and split < 16:
        split *= 2
    return split


def _stages(block_m: int, block_n: int, k: int, group_size: int, traits: DeviceTraits) -> int:
    """Steps of K in flight: up to 4 that fit shared memory (16 words a weight row, 128 columns an x row).

    AMD keeps them in registers: 2 where a step is one whole group, 1 where masks and more scales need the registers too
    (with 2, `fused` for group 32 spills up to 120 of them on gfx11).
    """
    if traits.vendor == "amd":
        return 2 if group_size % 128 == 0 and k % 128 == 0 else 1
    step = 16 * 4 * block_n + 128 * 2 * block_m
    return max(2, min(4, (traits.shared_memory - 32768) // step))
