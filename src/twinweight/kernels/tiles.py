"""Tile choice: one pure function a kernel, from shapes and `DeviceTraits` to one frozen dataclass.

Provenance of every number here. NVIDIA, 32 rows and fewer: H200, 28672 x 4096, group 128, bf16, 24 November 2026
(`benchmarks/results/h200-tiles-rows-whole.json`): the best of 28 to 66 candidates there, but measured before blocks of 16 rows
were stored together (`order.py`) and before `unroll`. NVIDIA above 32 rows, and AMD: UNTUNED, chosen by counting (bytes in
flight, programs a multiprocessor, registers) and from machine code without spills in the loop, which
`tests/kernels/test_compile.py` keeps so; distance from the best is unknown. RDNA and CDNA are "compiled for".
`benchmarks/gpu_tiles.py` measures candidates. Kernels accept any legal tiles, so tests and tuners force them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DeviceTraits:
    """What tile choice may know of a GPU.

    shared_memory: bytes a program can use. rounds_bf16: fp32 becomes bf16, to nearest even, in one instruction.
    ptx: its assembly is PTX. tensor_memory: products accumulate in a memory of their own (Blackwell), not in registers.
    """

    vendor: Literal["nvidia", "amd"]
    warp_size: int
    multiprocessors: int
    shared_memory: int
    rounds_bf16: bool
    ptx: bool = False
    tensor_memory: bool = False


@dataclass(frozen=True)
class DotTiles:
    """A tile of block_m x block_n outputs on matrix instructions, K in steps of 8 * block_words and in `split_k` parts.

    block_words: 8 (one block of 64 columns), or more where they divide a group. unroll: steps between two barriers, where
    that divides a part's steps. group_n: n-tiles that run together, so that
    the x and weight tiles they share stay in L2.
    """

    block_m: int
    block_n: int
    block_words: int
    split_k: int
    group_n: int
    num_warps: int
    num_stages: int
    unroll: int = 1


@dataclass(frozen=True)
class ExpandTiles:
    """block_n rows by block_words words (8 columns each) of the dense weight a program."""

    block_n: int
    block_words: int
    num_warps: int


def decode_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> DotTiles:
    """Tiles for `int4_linear`, few rows: three programs a multiprocessor, by splitting K where there are too few.

    On the H200 at 448 programs, splitting costs 3 % (in 2) to 10 % (in 8), and 64 columns a step instead of 128 cost 18 %.
    """
    nvidia = traits.vendor == "nvidia"
    block_m = (8 if nvidia and m <= 8 else 16) if m <= 16 else 32
    block_n = (128 if m > 16 else 64) if nvidia else 32
    words = _block_words(k, group_size, most=16 if nvidia else 8)
    programs = -(-n // block_n) * -(-m // block_m)
    split = _split_k(programs, -(-k // (8 * words)), 3 * traits.multiprocessors, least=4)
    warps = (8 if m > 16 else 4) if nvidia else 2
    stages = _stages(block_m, block_n, words, k, group_size, traits, most=4)
    return DotTiles(block_m, block_n, words, split, group_n=8, num_warps=warps, num_stages=stages)


def fused_tiles(m: int, n: int, k: int, group_size: int, traits: DeviceTraits) -> DotTiles:
    """Tiles for `fused_linear`, 32 rows and more: what counts is that unpacking hides behind the products. Untuned."""
    if m <= 32:
        return decode_tiles(m, n, k, group_size, traits)
    words = 8
    if traits.vendor == "nvidia":
        # Two programs a multiprocessor: one unpacks while the other multiplies. 256 x 128 on Hopper, one program, would unpack
        # half as often: it spills outside of the loop only, and waits for a measurement.
        block_m, block_n = 64 if m <= 64 else 128, 128
    else:
        # Larger tiles spill registers on gfx11; so do these on four warps where there are zero points.
        block_m, block_n = 128 if traits.warp_size == 64 and m > 64 else 64, 64
    programs = -(-n // block_n) * -(-m // block_m)
    split = _split_k(programs, -(-k // (8 * words)), traits.multiprocessors, least=8)
    warps = 8 if block_m * block_n > 8192 or (traits.vendor == "amd" and traits.warp_size == 32) else 4
    stages = _stages(block_m, block_n, words, k, group_size, traits, most=4)
    return DotTiles(block_m, block_n, words, split, group_n=8, num_warps=warps, num_stages=stages)


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


def _split_k(programs: int, steps: int, wanted: int, *, least: int) -> int:
    """Parts of K so that `wanted` programs run, each with `least` steps or more; a power of two to bound compilations."""
    split = 1
    while programs * split < wanted and steps // (2 * split) >= least and split < 16:
        split *= 2
    return split


def _stages(block_m: int, block_n: int, words: int, k: int, group_size: int, traits: DeviceTraits, *, most: int) -> int:
    """Steps of K in flight: up to `most` that fit shared memory. AMD keeps them in registers: 2."""
    if traits.vendor == "amd":
        return 2 if group_size % 128 == 0 and k % 128 == 0 else 1
    step = words * 4 * block_n + 8 * words * 2 * block_m
    return max(2, min(most, (traits.shared_memory - 32768) // step))
