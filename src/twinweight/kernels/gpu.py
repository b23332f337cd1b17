"""The GPU paths, in Triton, on words in the order of `order.py`, with the columns of a group side by side."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from twinweight.kernels.order import from_kernel_order, padded_rows, padded_words, to_kernel_order
from twinweight.kernels.padding import cliff_bytes as cliff
from twinweight.kernels.padding import empty_padded, padded_stride
from twinweight.kernels.prepared import Again, KernelWeight, group_order
from twinweight.paths import Path
from twinweight.weight import Int4Weight


def prepare(weight: Int4Weight) -> KernelWeight:
    """Into the order that the kernels read, a copy; act-order weights with their columns sorted by group."""
    perm = group_order(weight)
    n, k = weight.shape
    packed = to_kernel_order(weight.packed, k, perm)
    zeros = weight.zeros.to(torch.int16).contiguous() if weight.zeros is not None else None
    scales = weight.scales.contiguous()
    if scales.data_ptr() % 16:  # a view: kernels read two scales as one word
        scales = scales.clone()
    return KernelWeight(packed, scales, zeros, perm, weight.group_size, n, k)


def empty(n: int, k: int, group_size: int, dtype: torch.dtype, device: torch.device, *, symmetric: bool) -> KernelWeight:
    """Uninitialised, what `prepare` returns for a weight without act-order; dtype: of the scales."""
    packed = torch.empty((padded_rows(n), padded_words(k)), dtype=torch.int32, device=device)
    shape = (n, k // group_size)
    zeros = None if symmetric else torch.empty(shape, dtype=torch.int16, device=device)
    return KernelWeight(packed, torch.empty(shape, dtype=dtype, device=device), zeros, None, group_size, n, k)


def unprepare(w: KernelWeight, *, symmetric: bool, group_size: int) -> Int4Weight:
    """The `Int4Weight` that `prepare` took."""
    packed = from_kernel_order(w.packed, w.n, w.k, w.perm)
    g_idx = (torch.argsort(w.perm) // group_size).to(torch.int32) if w.perm is not None else None
    zeros = w.zeros.to(torch.uint8) if w.zeros is not None else None
    return Int4Weight(packed, w.scales, zeros, g_idx, w.group_size, w.k)


def weight_bytes(n: int, k: int, group_size: int, act_order: bool, symmetric: bool) -> int:
    """Bytes of what `prepare` returns."""
    return padded_rows(n) * padded_words(k) * 4 + n * (k // group_size) * (2 if symmetric else 4) + (4 * k if act_order else 0)


def int4_linear(x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N], for few rows."""
    x = x if w.perm is None else x.index_select(1, w.perm)
    y: Tensor = _triton().decode.int4_linear(x, w.packed, w.scales, w.zeros, bias, group_size=w.group_size)
    return y


def fused_linear(x: Tensor, w: KernelWeight, bias: Tensor | None) -> Tensor:
    """x: [M, K] -> [M, N], int4 unpacked inside the GEMM."""
    x = x if w.perm is None else x.index_select(1, w.perm)
    y: Tensor = _triton().fused.fused_linear(x, w.packed, w.scales, w.zeros, bias, group_size=w.group_size)
    return y


def launches(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    rows: Mapping[Path, Iterable[int]],
    *,
    symmetric: bool,
    bias: bool = False,
) -> Iterator[Callable[[], Tensor]]:
    """Calls by `fused` and by `int4` with so many rows, on tensors without data, for `launch.only_compiling`. The largest come
    first: their tiles take longest to compile.
    """
    meta = torch.device("meta")
    weight, added = empty(n, k, group_size, dtype, meta, symmetric=symmetric), torch.empty(n, dtype=dtype, device=meta)
    for path, linear in ((Path.FUSED, fused_linear), (Path.INT4, int4_linear)):
        for m in sorted(rows.get(path, ()), reverse=True):
            yield functools.partial(linear, torch.empty(m, k, dtype=dtype, device=meta), weight, added if bias else None)


def again(path: int, x: Tensor, w: KernelWeight, bias: Tensor | None) -> Again | None:
    """`int4_linear` or `fused_linear` for other x [..., K] of exactly this size. None in act-order, where this x is not
    contiguous or not aligned, and for other paths.
    """
    if path not in (Path.INT4, Path.FUSED) or w.perm is not None or not x.is_contiguous() or x.data_ptr() % 16:
        return None
    triton = _triton()
    choose = triton.tiles.decode_tiles if path == Path.INT4 else triton.tiles.fused_tiles
    rows, weight = x.view(-1, x.shape[-1]), (w.packed, w.scales, w.zeros)
    plan, start = triton.fused.planned(rows, weight, bias, w.group_size, None, None, choose), triton.fused.started
    shape = (*x.shape[:-1], w.n)
    return lambda x, w, bias: start(plan, x, (w.packed, w.scales, w.zeros), bias, x.new_empty(shape))


def expand(w: KernelWeight, out: Tensor) -> None:
    """Write the dense weight into out [N, K], tile by tile, rounding once."""
    expand_rows(w, 0, w.n, out)


def expand_rows(w: KernelWeight, first: int, last: int, out: Tensor) -> None:
    """As `expand`, for output features first to last, into out [last - first, K]."""
    _triton().expand.expand(w.packed, w.scales, w.zeros, w.perm, out, group_size=w.group_size, rows=(first, last))


def begin(device: torch.device) -> None:
    """Load what first calls on a GPU wait for, in the background: Triton and the hash of its own files, which names compiled
    kernels, and cuBLAS. It only saves time: what fails here shows again where it is used.
    """

    def load() -> None:
        with contextlib.suppress(Exception):
            _triton()
            from triton.runtime.cache import triton_key

            triton_key()
            ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
            torch.mm(ones, ones)

    threading.Thread(target=load, name="twinweight-begin", daemon=True).start()


@functools.cache
def _triton() -> Any:
    """The package of kernels with the modules that need Triton: imported at the first call, as plans are made without it, and
    not looked up in each, which takes as long as a launch's other checks.
    """
    import twinweight.kernels.decode
    import twinweight.kernels.expand
    import twinweight.kernels.fused

    return twinweight.kernels


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dense rows that are expanded for one product: the activations'."""
    return dtype


def paths_without_twin() -> tuple[int, ...]:
    """All: the crossovers between them are measured."""
    return (int(Path.INT4), int(Path.FUSED), int(Path.STREAM))


def twin_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The activation dtype: matrix units take nothing wider at that speed."""
    return (dtype,)


def empty_twin(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, K], with rows padded off the cache cliff where the GPU has one."""
    return empty_padded(n, k, dtype, device)


def twin_bytes(n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of `empty_twin`."""
    return n * padded_stride(k, dtype.itemsize, cliff_bytes=cliff(device)) * dtype.itemsize
