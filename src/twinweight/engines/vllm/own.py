"""A layer's int4 weight in our own layout, beside the inner kernel's: for ATen's int4 kernel on CPUs, ours on GPUs, `stream`.

It costs a quarter of a bf16 twin, so the plan weighs it like one. It comes from what the inner kernel holds (read where its
layout is known, else recovered from what it computes) and is kept only where it expands to that, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import torch

from twinweight import twin
from twinweight.engines.vllm import identity
from twinweight.engines.vllm.layout import CpuLayout
from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.kernels import backend_for, gpu, int4_path
from twinweight.kernels.launch import compile_together
from twinweight.kernels.prepared import KernelWeight, takes_group
from twinweight.memory import is_out_of_memory
from twinweight.paths import Path, pick
from twinweight.recover import recover
from twinweight.weight import SYMMETRIC_ZERO, Int4Weight, pack_nibbles

log = logging.getLogger("vllm.twinweight")

_ROWS = 1024  # output features compared at a time
_OURS = (Path.INT4, Path.FUSED, Path.STREAM)
_TRIED = 4  # numbers of rows of each path
_ROUNDED = 0.03  # of the largest result: what sums in another order, or in 16 bits, may differ by; wrong ones differ by more
SIZES = (
    *range(1, 8), *range(8, 256, 8), *range(256, 512, 16), *range(512, 8192, 64), *range(8192, 16385, 192),
)  # fmt: skip
"""Rows for which tiles may be others: those that vLLM captures graphs for (0.26 to 0.32), and so many beyond that a test finds
no other tiles between them. What is not compiled ahead, a prompt waits for.
"""

_MOST_TRIED = 4096  # rows: their products are held in fp32


def can_have(kernel: Wrapped) -> bool:
    """Whether an own copy may exist. On a CPU only where the layout is known: the identity takes 10 s a layer there. vLLM has
    kernels for groups that ours do not take (16).
    """
    c = kernel.config
    if (
        not kernel.copyable
        or c.weight_type.size_bits != 4
        or getattr(c, "has_g_idx", False)
        or not takes_group(kernel.k, _group_size(kernel))
    ):
        return False
    return kernel.device.type != "cpu" or CpuLayout.of(kernel) is not None


def nbytes(kernel: Wrapped) -> int:
    """Bytes of an own copy."""
    symmetric = not kernel.config.zero_points
    return backend_for(kernel.device).weight_bytes(kernel.n, kernel.k, _group_size(kernel), False, symmetric)


def held_bytes(kernel: Wrapped) -> int:
    """Bytes of what a layer has besides its own weight."""
    return twin.held_bytes(kernel.twin, kernel.twin_scales) + (kernel.own.nbytes if kernel.own is not None else 0)


@torch.inference_mode()
def make(kernel: Wrapped, *, exact: bool = True) -> KernelWeight | None:
    """The weight in our layout; None where that would compute something else, by as much as a rounded zero point if not
    `exact` (for 8-bit twins, which round more).
    """
    layout = CpuLayout.of(kernel)
    weight = recover(identity.dense(kernel), _group_size(kernel)) if layout is None else _read(layout, kernel.dtype)
    if weight is None:
        return None
    own = backend_for(kernel.device).prepare(weight)
    return own if layout is None or not exact or _is_exact(own, layout, kernel.dtype) else None


def allocate(kernel: Wrapped) -> None:
    """An uninitialised copy on a GPU, so that all of them share one pool; on a CPU `fill` makes it."""
    if kernel.device.type != "cpu":
        symmetric = not kernel.config.zero_points
        kernel.own = gpu.empty(kernel.n, kernel.k, _group_size(kernel), kernel.dtype, kernel.device, symmetric=symmetric)


@torch.inference_mode()
def fill(kernel: Wrapped) -> bool:
    """Write the copy from the layer's weight. False where it would not be exact, or not be had, and then there is none."""
    made, place = None, kernel.own
    try:
        made = make(kernel)
    except Exception as error:  # whatever Triton raises
        if is_out_of_memory(error):
            raise
        log.exception("Twinweight: an int4 weight cannot be read back")
    if place is None or made is None:
        kernel.own = made
    elif not _write(made, place):
        kernel.own = None
    return kernel.own is not None


@torch.inference_mode()
def refill(kernel: Wrapped) -> None:
    """Write new weights in place. Where they do not fit the copy: drops it on a CPU, whose routes go on without, and raises
    RuntimeError on a GPU, whose captured graphs hold its address.
    """
    if kernel.own is None:
        return
    made = make(kernel)
    if made is not None and _write(made, kernel.own):
        return
    if kernel.device.type != "cpu":
        raise RuntimeError("the new weights do not fit the own int4 copy of a layer: start the server anew")
    kernel.own = None


def _write(made: KernelWeight, place: KernelWeight) -> bool:
    """False where there are zero points and no place for them."""
    if place.zeros is None and made.zeros is not None:
        return False
    if place.zeros is not None and made.zeros is None:
        place.zeros.fill_(SYMMETRIC_ZERO)
    for new, old in ((made.packed, place.packed), (made.scales, place.scales), (made.zeros, place.zeros)):
        if new is not None and old is not None:
            old.copy_(new)
    return True


@torch.inference_mode()
def compile_paths(kernels: Iterable[Wrapped], most: int) -> None:
    """Compile what calls of up to `most` rows launch from the copies of these layers, several kernels at a time. Capturing
    graphs would wait for one after the other, and so would the first prompts. (`stream` has one kernel for all sizes.)
    """
    compile_together(call for kernel in kernels for call in _launches(kernel, most))


def sizes(most: int) -> list[int]:
    """Of `SIZES` those up to `most`, and the next one."""
    return [*(m for m in SIZES if m <= most), *[m for m in SIZES if m > most][:1]]


def launches(
    n: int, k: int, group_size: int, dtype: torch.dtype, most: int, *, symmetric: bool
) -> Iterator[Callable[[], object]]:
    """Calls, on tensors without data, that launch all that copies of such a weight may ever need with up to `most` rows."""
    rows = dict.fromkeys((Path.INT4, Path.FUSED), sizes(most))
    return gpu.launches(n, k, group_size, dtype, rows, symmetric=symmetric)


def _launches(kernel: Wrapped, most: int) -> Iterator[Callable[[], object]]:
    w = kernel.own
    if w is not None:
        rows = {path: [m for m in sizes(most) if pick(kernel.route, m) == path] for path in (Path.INT4, Path.FUSED)}
        biased = kernel.bias is not None
        yield from gpu.launches(w.n, w.k, w.group_size, kernel.dtype, rows, symmetric=w.zeros is None, bias=biased)


@torch.inference_mode()
def agrees(kernel: Wrapped) -> bool:
    """Whether our kernels compute on this GPU what a dense product with the inner kernel's weight does, but for rounding, on
    every path of the layer's route.

    The copy is exact; this is about kernels that nobody ran on such a GPU.
    """
    try:
        return kernel.own is None or _agrees(kernel, kernel.own, identity.dense(kernel))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("Twinweight: no memory to compare our kernels with a dense product")
        return True


def _agrees(kernel: Wrapped, copy: KernelWeight, weight: torch.Tensor) -> bool:
    for path in _OURS:
        rows = [m for m in sizes(_MOST_TRIED) if pick(kernel.route, m) == path]
        for m in rows[:: max(1, len(rows) // _TRIED)]:
            x = torch.randn(m, kernel.k, dtype=torch.float32, device=kernel.device).mul_(kernel.k**-0.5).to(kernel.dtype)
            expected = torch.nn.functional.linear(x, weight).float()
            try:
                off = (int4_path(path, x, copy, None).float() - expected).abs().max()
            except Exception as error:  # whatever Triton raises
                if is_out_of_memory(error):
                    raise
                log.exception("Twinweight: %s does not run with %d rows", path.name.lower(), m)
                return False
            if not off <= _ROUNDED * expected.abs().max():  # nor where it is no number
                log.warning("Twinweight: %s with %d rows is off by %g of %g", path.name.lower(), m, off, expected.abs().max())
                return False
    return True


def _group_size(kernel: Wrapped) -> int:
    given = int(kernel.config.group_size)
    return kernel.k if given <= 0 else given


def _read(layout: CpuLayout, dtype: torch.dtype) -> Int4Weight:
    zeros = layout.zero_points()
    return Int4Weight(
        pack_nibbles(layout.values()), layout.scales.t().contiguous().to(dtype),
        None if zeros is None else zeros.t().contiguous(), None, layout.group_size, layout.words.shape[1] // 2,
    )  # fmt: skip


def _is_exact(own: KernelWeight, layout: CpuLayout, dtype: torch.dtype) -> bool:
    """Our CPU kernel may round a zero point (`kernels/cpu.py`)."""
    for start in range(0, own.n, _ROWS):
        stop = min(start + _ROWS, own.n)
        mine = torch.empty(stop - start, own.k, dtype=dtype)
        backend_for(mine.device).expand_rows(own, start, stop, mine)
        if not torch.equal(mine, layout.rows(start, stop).dense(dtype)):
            return False
    return True
