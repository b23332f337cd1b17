"""Huge pages for weights on CPUs: reading gigabytes a token in pages of 4 KiB spends time on address translation."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h


def in_huge_pages(t: Tensor) -> Tensor:
    """t, a new tensor on the CPU that nothing was written to yet, with the kernel asked for pages of 2 MiB where they fit.

    Only advice: where the system has none to give, or is not Linux, nothing changes.
    """
    first = -(-t.data_ptr() // _HUGE) * _HUGE
    last = (t.data_ptr() + t.untyped_storage().nbytes()) // _HUGE * _HUGE
    if last > first and (madvise := _madvise()) is not None:
        madvise(first, last - first, _MADV_HUGEPAGE)
    return t


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
