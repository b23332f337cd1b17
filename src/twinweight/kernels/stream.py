"""`stream`: expand the int4 weight into a scratch, some rows at a time, and run the dense GEMM on them. No lasting memory.

The scratch is an ordinary temporary: the allocator hands the same block to layer after layer, on whatever stream and inside a
CUDA graph's pool, and a profiling run counts it with the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinweight.kernels import Backend, backend_for, pages
from twinweight.kernels.prepared import KernelWeight

SCRATCH_BYTES = 256 << 20
"""Most bytes of the scratch on a GPU: a tile of a weight. Larger weights (a head of 128k rows) take several."""

_CPU_TILE_BYTES = 16 << 20  # of the dense rows; they stay in the last-level cache between expansion and product
_ROWS = 64  # tiles start at multiples of this: the block of the CPU's layout


def scratch_bytes(n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of temporaries that one call takes, for an [n, k] weight and activations of `dtype`, besides its output."""
    itemsize = backend_for(device).stream_dtype(dtype).itemsize
    return tile_rows(n, k, itemsize, device) * k * itemsize


def stream_linear(backend: Backend, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N], the product on a dense twin of `stream_dtype`."""
    dtype = backend.stream_dtype(x.dtype)
    rows = tile_rows(w.n, w.k, dtype.itemsize, x.device)
    wide = x.to(dtype)
    wide_bias = bias.to(dtype) if bias is not None else None
    scratch = backend.empty_twin(rows, w.k, dtype, x.device)
    if rows == w.n:
        backend.expand_rows(w, 0, rows, scratch)
        return torch.nn.functional.linear(wide, scratch, wide_bias).to(x.dtype)
    y = pages.empty(x.shape[0], w.n, dtype=dtype) if x.device.type == "cpu" else x.new_empty(x.shape[0], w.n, dtype=dtype)
    for start in range(0, w.n, rows):
        stop = min(start + rows, w.n)
        _tile(backend, wide, w, wide_bias, scratch[: stop - start], y, start, stop)
    return y.to(x.dtype)


def _tile(
    backend: Backend, x: Tensor, w: KernelWeight, bias: Tensor | None, scratch: Tensor, y: Tensor, start: int, stop: int
) -> None:
    backend.expand_rows(w, start, stop, scratch)
    if bias is None:
        torch.mm(x, scratch.t(), out=y[:, start:stop])
    else:
        torch.addmm(bias[start:stop], x, scratch.t(), out=y[:, start:stop])


def tile_rows(n: int, k: int, itemsize: int, device: torch.device) -> int:
    """Rows of an [n, k] weight that are expanded at once: of tiles that are alike, in multiples of 256 as tiles of GEMMs are.

    A last tile that is smaller leaves part of a GPU idle: 8192 x 28672 in 4672 and 3520 rows takes five rounds of 128 x 256
    outputs on 132 multiprocessors for 2048 rows of x, in twice 4096 it takes four.
    """
    most = _CPU_TILE_BYTES if device.type == "cpu" else SCRATCH_BYTES
    limit = max(_ROWS, most // (k * itemsize) // _ROWS * _ROWS)
    if n <= limit:
        return n
    even = -(-n // -(-n // limit))
    rows = -(-even // 256) * 256
    return rows if rows <= limit else -(-even // _ROWS) * _ROWS
