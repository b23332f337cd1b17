"""`Int4Linear`: the module that replaces `nn.Linear`; it owns the int4 weight and, perhaps, its twin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twinweight import ops
from twinweight import twin as twins
from twinweight.kernels import backend_for
from twinweight.kernels.prepared import KernelWeight
from twinweight.memory import is_out_of_memory
from twinweight.paths import Path, Route, calls
from twinweight.steps import Steps, keep, steps_of
from twinweight.weight import Int4Weight

log = logging.getLogger("twinweight")


def _weight_of(fields: Mapping[str, Any], k: int) -> Int4Weight:
    """An `Int4Weight` from the tensors of a state dict; raises ValueError where they do not belong together."""
    packed, scales = fields["packed"], fields["scales"]
    if packed.ndim != 2 or scales.ndim != 2:
        raise ValueError(f"packed of shape {list(packed.shape)} and scales of {list(scales.shape)}, expected matrices")
    columns, groups = packed.shape[1] * 8, scales.shape[1]
    k = k if columns - 8 < k <= columns else columns
    if groups == 0 or k % groups:
        raise ValueError(f"{groups} scales a row for {k} columns")
    expected = {"scales": (packed.shape[0], groups), "zeros": (packed.shape[0], groups), "g_idx": (k,)}
    for name, shape in expected.items():
        if fields[name] is not None and tuple(fields[name].shape) != shape:
            raise ValueError(f"{name} of shape {list(fields[name].shape)}, expected {list(shape)}")
    return Int4Weight(**fields, group_size=k // groups, in_features=k)


_TWIN = int(Path.TWIN)
_INT4 = ("packed", "scales", "zeros", "perm")
_STORED = {"weight_packed": "packed", "weight_scale": "scales", "weight_zero_point": "zeros", "weight_g_idx": "g_idx"}


@dataclass(frozen=True, slots=True)
class _Ready:
    """What the steps were worked out for."""

    weight: KernelWeight
    twin: Tensor | None
    bias: Tensor | None
    route: Route
    steps: Steps


def _ready(w: KernelWeight, twin: Tensor | None, scales: Tensor | None, bias: Tensor | None, route: Route) -> _Ready:
    kind = twins.kind_of(twin, scales) if twin is not None else None
    weight = w.n, w.k, w.group_size, w.scales.dtype, w.packed.device, w.zeros is None, w.perm is None
    looks = None if bias is None else (bias.shape, bias.dtype)
    return _Ready(w, twin, bias, route, steps_of(tuple(route.flat()), kind, looks, *weight))


class Int4Linear(nn.Module):
    """x [..., K] -> [..., N].

    Its `state_dict` holds the weight in a layout of no device (`weight_packed`, `weight_scale`, `weight_zero_point`,
    `weight_g_idx` as in `Int4Weight`); the twin is in neither `state_dict` nor `parameters()`. Loading a state dict
    writes the weight and the twin in place, at the addresses they have.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: nn.Parameter | None
    twin: Tensor | None
    twin_scales: Tensor | None

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.checkpoint_group_size = weight.group_size
        self.symmetric = weight.zeros is None
        kernel = backend_for(weight.packed.device).prepare(weight)
        self.group_size = kernel.group_size
        self._kernel_weight: KernelWeight | None = None
        self._ready: _Ready | None = None
        for name in _INT4:
            self.register_buffer(name, getattr(kernel, name), persistent=False)
        self.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if bias is not None else None)
        self.register_buffer("twin", None, persistent=False)
        self.register_buffer("twin_scales", None, persistent=False)
        self.use_twin = True
        self.route_without_twin = Route.always(Path.INT4)
        self.route_with_twin = Route.always(Path.INT4)

    def forward(self, x: Tensor) -> Tensor:
        twin = self._buffers["twin"] if self.use_twin else None
        scales = None if twin is None else self._buffers["twin_scales"]
        route = self.route_without_twin if twin is None else self.route_with_twin
        bias = self._parameters["bias"]
        if ops.only_computes(x, bias):
            return self._computed(x, twin, scales, bias, route)
        self._check_width(x)
        return torch.ops.twinweight.linear(  # type: ignore[no-any-return]
            x,
            self.packed,
            self.scales,
            self.zeros,
            self.perm,
            bias,
            twin,
            scales,
            route.flat(),
            self.group_size,
            self.out_features,
        )

    def _computed(self, x: Tensor, twin: Tensor | None, scales: Tensor | None, bias: Tensor | None, route: Route) -> Tensor:
        """`ops.run`, or what it would do where the size of x was met before."""
        ready = self._ready
        if ready is None or ready.twin is not twin or ready.bias is not bias or ready.route is not route:
            ready = self._ready = _ready(self.kernel_weight, twin, scales, bias, route)
        key = x.shape, x.dtype, x.get_device()
        step, usual = ready.steps.get(key), x.is_contiguous() and not x.data_ptr() & 15
        if usual and step is not None and step.again is not None:
            operand = twin if step.path == _TWIN else self.kernel_weight
            if operand is twin or operand is ready.weight:
                calls[step.counted] += 1
                return step.again(x, operand, bias)
        self._check_width(x)
        weight, flat = self.kernel_weight, route.flat()
        y = ops.run(x, weight, bias, twin, scales, flat)
        if weight is not ready.weight:
            self._ready = None
        elif usual and step is None:
            keep(ready.steps, key, ops.step_of(x, weight, bias, twin, scales, flat))
        return y

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"activations have {x.shape[-1]} features, the int4 weight takes {self.in_features}")

    @property
    def kernel_weight(self) -> KernelWeight:
        """The int4 weight in the layout of its device; made anew where a tensor was replaced."""
        held, now = self._kernel_weight, self._buffers
        if (
            held is None or held.packed is not now["packed"] or held.scales is not now["scales"]
            or held.zeros is not now["zeros"] or held.perm is not now["perm"]
        ):  # fmt: skip
            n, k = self.out_features, self.in_features
            held = KernelWeight(self.packed, self.scales, self.zeros, self.perm, self.group_size, n, k)
            self._kernel_weight = held
        return held

    @property
    def int4_weight(self) -> Int4Weight:
        """The int4 weight in the layout of no device (a copy)."""
        return backend_for(self.packed.device).unprepare(
            self.kernel_weight, symmetric=self.symmetric, group_size=self.checkpoint_group_size
        )

    @property
    def twin_kind(self) -> str | None:
        """The kind of the twin there is: "bfloat16", "int8", ..."""
        return twins.kind_of(self.twin, self.twin_scales) if self.twin is not None else None

    @property
    def twin_bytes(self) -> int:
        """Bytes that the twin holds, padding and scales included."""
        return twins.held_bytes(self.twin, self.twin_scales)

    def build_twin(self, kind: str | torch.dtype) -> None:
        """Make the twin from the int4 weight: in place where one of this kind exists, else in new memory.

        kind: as in `twin`; a dtype is the dense kind of that dtype.
        Raises torch.OutOfMemoryError (GPU) or MemoryError/RuntimeError (CPU); the module then has no twin.
        """
        kind = str(kind).removeprefix("torch.")
        data, scales = self.twin, self.twin_scales
        if data is None or self.twin_kind != kind:
            self.drop_twin()
            data, scales = twins.empty(kind, self.out_features, self.in_features, self.packed.device)
        twins.fill(self.kernel_weight, data, scales)
        self.twin, self.twin_scales = data, scales

    def drop_twin(self) -> None:
        """Free the twin; calls take the paths without it from now on."""
        self.twin = self.twin_scales = self._ready = None

    def set_weight(self, weight: Int4Weight) -> None:
        """New values of the same kind, written in place; a twin is refreshed in place. Raises ValueError on a mismatch."""
        mine = (self.out_features, self.in_features, self.checkpoint_group_size, self.symmetric, self.perm is None)
        theirs = (*weight.shape, weight.group_size, weight.zeros is None, weight.g_idx is None)
        if mine != theirs:
            kind = "{} x {}, group size {}, symmetric {}, without act-order {}"
            raise ValueError(f"the new weight is {kind.format(*theirs)}; the module holds {kind.format(*mine)}")
        kernel = backend_for(self.packed.device).prepare(weight.to(self.packed.device, self.scales.dtype))
        for name in _INT4:
            if (old := getattr(self, name)) is not None:
                old.copy_(getattr(kernel, name))
        if (held := self.twin_kind) is not None:
            self.build_twin(held)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel_weight": None, "_ready": None}  # derived, and steps are not for pickle

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        """`.to()` and friends. Another device has another layout, and the twin is derived: both are made anew there."""
        probe = fn(torch.empty(0, dtype=self.scales.dtype, device=self.scales.device))
        if (probe.device, probe.dtype) == (self.scales.device, self.scales.dtype):
            return self
        self._kernel_weight = self._ready = None  # they would keep the old tensors
        if probe.is_meta:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        kind = self.twin_kind
        weight = self.int4_weight.to(probe.device, probe.dtype)
        kind = self._kind_there(kind, probe) if kind is not None else None
        self.drop_twin()
        kernel = backend_for(probe.device).prepare(weight)
        self.group_size = kernel.group_size
        for name in _INT4:
            setattr(self, name, getattr(kernel, name))
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        if kind is not None:
            try:
                self.build_twin(kind)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.drop_twin()
                log.warning("out of memory while moving a twin to %s: the weight stays int4 there", probe.device)
        return self

    def _kind_there(self, kind: str, probe: Tensor) -> str:
        """What a twin becomes where `probe` is: of the same kind, or dense where that is not possible there."""
        same = str(self.scales.dtype).removeprefix("torch.") == kind
        if kind in twins.LOSSY:
            n, k, group = self.out_features, self.in_features, self.checkpoint_group_size
            possible = twins.refusal(kind, n, k, group, self.perm is not None, probe.device) is None
        else:
            possible = not same and kind in twins.dense_kinds(probe.dtype, probe.device)
        return kind if possible else str(probe.dtype).removeprefix("torch.")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.int4_weight
        for stored, field in _STORED.items():
            if (tensor := getattr(weight, field)) is not None:
                destination[prefix + stored] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {field: state_dict.get(prefix + stored) for stored, field in _STORED.items()}
        rest = {k: v for k, v in state_dict.items() if k[len(prefix) :] not in _STORED or not k.startswith(prefix)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if own["packed"] is None or own["scales"] is None:
            missing_keys.extend(prefix + s for s in ("weight_packed", "weight_scale") if prefix + s not in state_dict)
            return
        try:
            self.set_weight(_weight_of(own, self.in_features))
        except ValueError as error:
            error_msgs.append(f"{prefix}: {error}")

    def extra_repr(self) -> str:
        twin = self.twin_kind or "none"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, group_size={self.checkpoint_group_size}, {kind}, twin={twin}"
