"""The order of the packed words that GPU kernels read, and the way there and back.

A row is cut into blocks of 64 columns, 8 words each. Word i of a block holds columns 16j + 2i (bits 4j..4j+3) and
16j + 2i + 1 (bits 16+4j..19+4j) for j = 0..3. So quarter j of a block, shifted down and masked, is 16 neighbouring columns
in pairs that fill one 32-bit register each, and it is in the order in which matrix instructions take a step of K = 16: x
needs no reordering, and weights no moves between lanes.

Blocks are stored 16 rows at a time: [N / 16, K / 64, 16 rows, 8 words]. Programs walk along K, and what they read is then one
stream of 512-byte pieces for 16 rows, where rows kept whole would give 16 streams of 32 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight.kernels.prepared import TILE_BYTES
from twinweight.weight import pack_nibbles, unpack_nibbles

BLOCK = 64
"""Columns of a block; rows are padded to whole ones."""

BLOCK_WORDS = BLOCK // 8

ROWS = 16
"""Rows stored together; the weight is padded to a multiple of them."""


_BYTES_A_VALUE = 4
"""Of temporaries, at most."""


def padded_words(k: int) -> int:
    """Words of a row of k columns."""
    return -(-k // BLOCK) * BLOCK_WORDS


def padded_rows(n: int) -> int:
    """Rows that a weight of n rows takes."""
    return -(-n // ROWS) * ROWS


def to_kernel_order(packed: Tensor, k: int, perm: Tensor | None = None) -> Tensor:
    """`Int4Weight.packed` -> int32 [padded_rows(N), padded_words(k)] in this module's order, a copy.

    perm: [k], stored column j is column perm[j] of the checkpoint; or None. Temporaries stay near `TILE_BYTES`.
    """
    n, words = packed.shape[0], padded_words(k)
    out = torch.empty((padded_rows(n), words), dtype=torch.int32, device=packed.device)
    step = _rows_a_tile(words)
    for at in range(0, n, step):
        values = unpack_nibbles(packed[at : at + step])[:, :k]
        if perm is not None:
            values = values.index_select(1, perm)
        rows = padded_rows(len(values))
        padded = torch.nn.functional.pad(values, (0, words * 8 - k, 0, rows - len(values)))
        # [16 rows, row, block, j // 2, j % 2, i, half]: a byte of a word holds an even j, and the next one above it
        pairs = padded.view(rows // ROWS, ROWS, -1, 2, 2, BLOCK_WORDS, 2)
        octets = pairs[:, :, :, :, 0] | pairs[:, :, :, :, 1] << 4
        out[at : at + rows] = octets.permute(0, 2, 1, 4, 5, 3).reshape(rows, words * 4).view(torch.int32)
    return out


def from_kernel_order(packed: Tensor, n: int, k: int, perm: Tensor | None = None) -> Tensor:
    """The inverse of `to_kernel_order`: int32 [n, ceil(k / 8)], a copy."""
    out = torch.empty((n, -(-k // 8)), dtype=torch.int32, device=packed.device)
    inverse = torch.argsort(perm) if perm is not None else None
    words = packed.shape[1]
    step = _rows_a_tile(words)
    for at in range(0, n, step):
        stored = packed[at : at + step]
        octets = stored.view(torch.uint8).view(len(stored) // ROWS, -1, ROWS, BLOCK_WORDS, 2, 2).permute(0, 2, 1, 5, 3, 4)
        values = torch.stack((octets & 15, octets >> 4), dim=4).view(len(stored), -1)[: n - at, :k]
        out[at : at + step] = pack_nibbles(values if inverse is None else values.index_select(1, inverse))
    return out


def _rows_a_tile(words: int) -> int:
    return max(1, TILE_BYTES // (words * 8 * _BYTES_A_VALUE) // ROWS) * ROWS
