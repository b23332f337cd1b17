"""Huge pages on CPUs, for weights and for large temporaries.

Reading gigabytes a token in pages of 4 KiB spends time on address translation. And malloc takes blocks above 32 MiB fresh from
the system in every call: an output of 1024 x 28672 in bf16 took 17 ms to write in small pages and 5 in huge ones, of 140 for an
int8 product (two cores, Linux 6).
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h
LARGE = 4 << 20
"""Bytes from which `empty` asks for huge pages; smaller blocks come from memory that malloc has already."""


def in_huge_pages(t: Tensor) -> Tensor:
    """t, a new tensor on the CPU that nothing was written to yet, with the kernel asked for pages of 2 MiB where they fit.

    Only advice: where the system has none to give, or is not Linux, nothing changes.
    """
    first = -(-t.data_ptr() // _HUGE) * _HUGE
    last = (t.data_ptr() + t.untyped_storage().nbytes()) // _HUGE * _HUGE
    if last > first and (madvise := _madvise()) is not None:
        madvise(first, last - first, _MADV_HUGEPAGE)
    return t


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in huge pages where it is large."""
    t = torch.empty(shape, dtype=dtype)
    return in_huge_pages(t) if t.nbytes >= LARGE else t


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
