"""The shapes every kernel is tested on: zero, odd and ragged ones beside round ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.helpers import random_weight
from twinweight.kernels.forms import AmpereTiles, DotTiles, ExpandTiles, HopperFewTiles, HopperTiles
from twinweight.weight import Int4Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True
    bias: bool = False
    strided: bool = False
    """Rows of x and out lie further apart than their length."""

    def weight(self, act_order: bool = False) -> Int4Weight:
        weight = random_weight(self.n, self.k, self.group_size, self.dtype, self.symmetric, act_order, seed=self.n + self.k)
        return weight.to(DEVICE)

    def __str__(self) -> str:
        parts = [f"m{self.m}-n{self.n}-k{self.k}-g{self.group_size}", "bf16" if self.dtype == torch.bfloat16 else "fp16"]
        flags = {"asym": not self.symmetric, "bias": self.bias, "strided": self.strided}
        return "-".join(parts + [name for name, on in flags.items() if on])


_FP16 = torch.float16
CASES = [
    Case(0, 64, 128, 128),
    Case(1, 64, 128, 32),
    Case(1, 577, 96, 32, symmetric=False, bias=True),
    Case(1, 16, 859, 859, dtype=_FP16, symmetric=False, strided=True),
    Case(3, 16, 160, 32, dtype=_FP16, symmetric=False, bias=True, strided=True),
    Case(3, 80, 384, 128, dtype=_FP16, symmetric=False),
    Case(5, 577, 320, 64, bias=True),
    Case(5, 16, 859, 859, symmetric=False, bias=True, strided=True),
    Case(17, 96, 256, 128, symmetric=False, bias=True),
    Case(17, 48, 859, 859, dtype=_FP16),
    Case(17, 16, 160, 32, strided=True),
    Case(40, 100, 512, 512, dtype=_FP16, bias=True),
    Case(9, 40, 192, 96, symmetric=False),
    Case(130, 200, 448, 32, dtype=_FP16, symmetric=False, bias=True),
    Case(96, 80, 1024, 1024),
]

DOT = DotTiles(32, 32, 8, split_k=1, group_n=8, num_warps=4, num_stages=2)
LINEAR_TILES = {
    "chosen": None,
    "dot": DOT,
    "dot-narrow": replace(DOT, block_m=16, group_n=2),
    "dot-split": replace(DOT, split_k=3),
    "dot-sums": replace(DOT, split_k=2, scale_sums=True),
}
WIDE_TILES = {"dot-wide": replace(DOT, block_words=16), "dot-wide-split": replace(DOT, block_words=32, split_k=2)}
WIDE_TILES["dot-wide-sums"] = replace(WIDE_TILES["dot-wide"], scale_sums=True)
"""For groups that a wide step divides, and one group a row."""

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HOPPER_TILES = {
    "hopper": HopperTiles(64, 0, 64, split_k=1, group_n=8, num_warps=4),
    "hopper-two-sums": HopperTiles(32, 16, 128, split_k=1, group_n=2, num_warps=8),
    "hopper-split": HopperTiles(128, 64, 64, split_k=3, group_n=8, num_warps=4),
    "hopper-rest": HopperTiles(64, 0, 64, split_k=2, group_n=8, num_warps=4, whole=1),
    "hopper-wide": HopperTiles(128, 0, 256, split_k=1, group_n=8, num_warps=8),
}
"""For K in whole blocks of 64 columns, and rows of x that are aligned."""

ON_AMPERE = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
AMPERE_TILES = {
    "ampere": AmpereTiles(8, 32, 8, depth=1, split_k=1, num_warps=2),
    "ampere-split": AmpereTiles(16, 64, 8, depth=1, split_k=3, num_warps=4),
    "ampere-repeats": AmpereTiles(32, 64, 8, depth=1, split_k=1, num_warps=2),
    "ampere-steps": AmpereTiles(8, 64, 16, depth=2, split_k=1, num_warps=4, registers=80),
    "ampere-steps-split": AmpereTiles(16, 128, 16, depth=2, split_k=2, num_warps=4),
    "ampere-rest": AmpereTiles(8, 64, 8, depth=1, split_k=2, num_warps=4, whole=1),
}
"""For K in whole turns, rows of x that are aligned, and groups that steps divide."""

HOPPER_FEW_TILES = {
    "few": HopperFewTiles(16, 64, 8, depth=4, split_k=1, num_warps=4, registers=96),
    "few-step": HopperFewTiles(16, 64, 8, depth=1, split_k=1, num_warps=4),
    "few-split": HopperFewTiles(16, 64, 8, depth=2, split_k=3, num_warps=4),
    "few-rest": HopperFewTiles(16, 64, 8, depth=2, split_k=2, num_warps=4, whole=1),
    "few-wide": HopperFewTiles(32, 128, 8, depth=2, split_k=1, num_warps=8),
}
"""The same on Hopper."""

EXPAND_TILES = {"chosen": None, "small": ExpandTiles(block_n=64, block_words=8, num_warps=1)}
