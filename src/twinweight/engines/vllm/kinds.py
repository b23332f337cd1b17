"""`Kind`: what of a layer in vLLM its times depend on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

import torch

from twinweight.crossover import Shape
from twinweight.engines.vllm.wrapped import Wrapped
from twinweight.kernels import backend_for
from twinweight.kernels.prepared import takes_group
from twinweight.workload import HEAD_ROWS

_SETTINGS = ("VLLM_HUMMING_USE_F16_ACCUM", "VLLM_MARLIN_USE_ATOMIC_ADD")
"""Variables by which inner kernels of one name run at different speeds."""


@dataclass(frozen=True)
class Kind:
    """What a measurement holds for: two layers of equal `Kind` run at equal speed. copyable: as in `Wrapped`. most: rows of
    its calls, 0 for as many as a step has.
    """

    n: int
    k: int
    group_size: int
    weight: str
    zero_points: bool
    act_order: bool
    dtype: torch.dtype
    inner: str
    settings: str = ""
    copyable: bool = True
    most: int = 0

    def __str__(self) -> str:
        return f"{self.n}x{self.k} ({self.inner})"

    @property
    def key(self) -> dict[str, object]:
        """What the cache knows it by."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("copyable", "most")}
        return {"engine": "vllm", **fields, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def timed(self) -> Kind:
        """The kind as it was timed, with a copy and for any rows."""
        return replace(self, copyable=True, most=0)


def kind_of(kernel: Wrapped) -> Kind:
    """The `Kind` of a layer."""
    c = kernel.config
    settings = ",".join(f"{name}={value}" for name in _SETTINGS if (value := os.environ.get(name)))
    return Kind(
        kernel.n, kernel.k, c.group_size, str(c.weight_type), c.zero_points, getattr(c, "has_g_idx", False), kernel.dtype,
        type(kernel.inner).__name__, settings, kernel.copyable, most_rows(kernel),
    )  # fmt: skip


def most_rows(kernel: Wrapped) -> int:
    """Of `Kind`; an output head is a `ParallelLMHead`."""
    return HEAD_ROWS if hasattr(kernel.layer, "org_vocab_size") else 0


def shape_of(kernel: Wrapped) -> Shape:
    """What the embedded engine would call a layer's shape."""
    c = kernel.config
    group = kernel.k if c.group_size <= 0 or not takes_group(kernel.k, int(c.group_size)) else int(c.group_size)
    return Shape(kernel.n, kernel.k, group, not c.zero_points, False, kernel.dtype, kernel.device)


def dense_kind(kernel: Wrapped) -> str:
    """Of the exact kinds the one with the fastest GEMM; each that is timed takes seconds of a start-up on CPUs."""
    return str(backend_for(kernel.device).stream_dtype(kernel.dtype)).removeprefix("torch.")
