"""`TwinLinearKernel`: stands first in vLLM's list, keeps the kernel vLLM would have chosen for `int4`, and may hold a twin."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MPLinearKernel

from twinweight.engines.vllm import build, compat, op, own
from twinweight.kernels.prepared import KernelWeight
from twinweight.paths import Path, Route
from twinweight.steps import steps_of
from twinweight.twin import kind_of

ONLY_INT4 = Route.always(Path.INT4).flat()


class TwinLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """One linear layer of a model: [K, N] of a partition, by vLLM's naming.

    State is kept here, not on the layer: vLLM moves, clones and reloads what a layer registers, and the addresses of twins
    must stay. own: the weight in our layout, if there; then the inner kernel is the path INNER. bias: as the inner kernel adds
    it, where there is a bias, and a twin or an own weight (Marlin permutes the layer's). made: parameters that the inner kernel
    added to the layer. freed: bytes of vLLM's own weight that are gone (`spare`). on_made: is told of each that is made.
    """

    on_made: ClassVar[Callable[[TwinLinearKernel], None] | None] = None

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: the inner kernel has its own limit."""
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Whatever some kernel of vLLM can, as long as activations stay in 16 bits."""
        reason = compat.refusal(c)
        if reason is None:
            try:
                compat.choose_inner(c)
            except ValueError as error:
                reason = f"no inner kernel: {error}"
        return reason is None, reason

    def __init__(self, c: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(c, *args, **kwargs)  # names of the parameters, which other parts of vLLM may ask for
        self.inner = compat.choose_inner(c)(c, *args, **kwargs)
        self.k, self.n = c.partition_weight_shape
        self.dtype: torch.dtype = c.act_type
        self.twin: Tensor | None = None
        self.twin_scales: Tensor | None = None
        self.twin_t: Tensor | None = None
        self.scales_t: Tensor | None = None
        self.bias: Tensor | None = None
        self.own: KernelWeight | None = None
        self.fresh = False
        self.copyable = True
        self.freed = 0
        self._layer: weakref.ref[nn.Module] | None = None
        self.route = ONLY_INT4
        self.handle: Tensor | None = None
        self.made: set[str] = set()
        if TwinLinearKernel.on_made is not None:
            TwinLinearKernel.on_made(self)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Repack by the inner kernel. In a layerwise reload the layer holds new tensors now: the twin follows, in place."""
        before = {name for name, _ in layer.named_parameters(recurse=False)}
        self.inner.process_weights_after_loading(layer)
        self.made = {name for name, _ in layer.named_parameters(recurse=False)} - before
        self._layer = weakref.ref(layer)
        if self.handle is None:
            self.handle = op.handle_for(self, self.device)
        self.refill()

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N]; traced, so nothing is decided here. Untraced, the dispatcher's 10 us are saved."""
        if not torch.compiler.is_compiling():
            return op.run(self, x, bias)
        return torch.ops.twinweight.vllm_linear(x, self.handle, bias, self.n)  # type: ignore[no-any-return]

    def inner_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By the inner kernel on the layer's current tensors. Raises RuntimeError where these are gone."""
        if self.freed:
            raise RuntimeError('vLLM\'s int4 weight of this layer was freed: its server was started with "reload": false')
        y: Tensor = self.inner.apply_weights(self.layer, x, bias)
        return y

    @property
    def route(self) -> list[int]:
        """`Route.flat()`: which path serves which number of rows."""
        return self._route

    @route.setter
    def route(self, flat: list[int]) -> None:
        c, kind = self.config, kind_of(self.twin, self.twin_scales) if self.twin is not None else None
        weight = c.partition_weight_shape, c.act_type, c.group_size, c.zero_points, self.device if self.is_ready else None
        self._route = flat
        self.steps = steps_of(tuple(flat), kind, *weight)

    @property
    def layer(self) -> Any:
        """The layer this kernel computes. Raises RuntimeError before its weights were processed."""
        layer = self._layer() if self._layer is not None else None
        if layer is None:
            raise RuntimeError("the kernel has no layer: its weights were not processed")
        return layer

    @property
    def device(self) -> torch.device:
        """Where the layer's weights are."""
        return next(self.layer.parameters()).device  # type: ignore[no-any-return]

    @property
    def is_ready(self) -> bool:
        """Whether weights were processed for a layer that still lives."""
        return self._layer is not None and self._layer() is not None

    def refill(self) -> None:
        """Write the layer's current weights into what is derived from them, in place."""
        if self.own is not None:
            own.refill(self)
        build.fill(self)

    def drop(self) -> None:
        """Free all that is derived; the layer goes on with the inner kernel."""
        self.route = ONLY_INT4
        self.twin = self.twin_scales = self.twin_t = self.scales_t = self.bias = self.own = None
        self.fresh = False


def kernels_of(model: nn.Module) -> dict[str, TwinLinearKernel]:
    """The wrapped layers of a model, by module name, in module order.

    Found through their kernels: every quantization method of vLLM keeps its kernel under another name.
    """
    by_layer = {id(k.layer): k for k in op.kernels() if isinstance(k, TwinLinearKernel) and k.is_ready}
    modules = ((name, m, by_layer.get(id(m))) for name, m in model.named_modules())
    return {name: k for name, _, k in modules if k is not None}
