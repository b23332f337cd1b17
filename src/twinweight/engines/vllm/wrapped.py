"""`Wrapped`: a linear layer of a model with the kernel that vLLM chose for it, as all that works on its weight sees it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from twinweight.engines.vllm.op import Paths


class Wrapped(Paths, Protocol):
    """[K, N] of a partition, by vLLM's naming; `kernel.TwinLinearKernel` is one.

    config: vLLM's `MPLinearLayerConfig`. inner: its kernel for the layer. fresh: whether what is derived from the weight holds
    the current one. copyable: whether an own int4 copy may still be tried.
    """

    k: int
    dtype: torch.dtype
    config: Any
    inner: Any
    fresh: bool
    copyable: bool

    @property
    def layer(self) -> Any:
        """The layer itself. Raises RuntimeError before its weights were processed."""

    @property
    def device(self) -> torch.device:
        """Where the layer's weights are."""

    def drop(self) -> None:
        """Free all that is derived."""
