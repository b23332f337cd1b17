"""What tiles are, of each kernel, and what their choice may know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SPLITS = (1, 2, 3, 4, 6, 8)
"""Parts of K that `hopper.py` is given: few, since those of all tiles are added up at once."""

MOST_PARTS = SPLITS[-1]
"""Of K, for kernels in Gluon."""


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
class FewTiles:
    """A tile of block_m rows by block_n features, 8 or 16 rows and 64 features or so: K in turns of `depth` steps.

    block_m: 8 or a multiple. block_n: 16 features a warp or a power of two more. block_words: of a step, in one group. K is a
    whole number of turns. registers: most of a lane; 0: what it takes. whole: tiles whose K one program does; only K of those
    after them is divided, into `split_k` parts, so that all multiprocessors have as much to do.
    """

    block_m: int
    block_n: int
    block_words: int
    depth: int
    split_k: int
    num_warps: int
    registers: int = 0
    whole: int = 0

    @property
    def rows(self) -> int:
        """Rows of x a program takes."""
        return self.block_m


class AmpereTiles(FewTiles):
    """Of `ampere.py`. block_words: 8 or 16."""


class HopperFewTiles(FewTiles):
    """Of `hopper_few.py`. block_words: 8, one block of 64 columns. num_warps: 4 or 8."""


@dataclass(frozen=True)
class ExpandTiles:
    """block_n rows by block_words words (8 columns each) of the dense weight a program."""

    block_n: int
    block_words: int
    num_warps: int
