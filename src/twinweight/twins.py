"""The twins of a whole model: candidates for the plan, routes, building, dropping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from twinweight.crossover import Crossovers, Shape, twin_choice, without_twin
from twinweight.errors import ConfigError
from twinweight.kernels import backend_for
from twinweight.linear import Int4Linear
from twinweight.memory import is_out_of_memory
from twinweight.paths import Path, Route
from twinweight.plan import GIB, Budget, Mode, Plan, TwinCandidate, TwinOption, plan

log = logging.getLogger("twinweight")


@dataclass(frozen=True)
class TwinState:
    """What was decided for a model; `model.twinweight` holds it."""

    plan: Plan
    crossovers: Crossovers


def attach(model: nn.Module, state: TwinState) -> None:
    """Set `model.twinweight`."""
    model.__dict__["twinweight"] = state


def state_of(model: nn.Module) -> TwinState:
    """`model.twinweight`, typed. Raises ConfigError for a model that Twinweight did not load."""
    state = model.__dict__.get("twinweight")
    if not isinstance(state, TwinState):
        raise ConfigError(f"{type(model).__name__} was not loaded by Twinweight")
    return state


def int4_linears(model: nn.Module) -> dict[str, Int4Linear]:
    """The int4 weights of a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


def shape_of(linear: Int4Linear) -> Shape:
    """The `Shape` of a loaded module."""
    return Shape(
        linear.out_features, linear.in_features, linear.checkpoint_group_size, linear.symmetric, linear.perm is not None,
        linear.scales.dtype, linear.packed.device,
    )  # fmt: skip


def candidates(shapes: Mapping[str, Shape], crossovers: Crossovers) -> list[TwinCandidate]:
    """Each weight with the twins it could have, and what a prefill-sized call would save with each."""
    out = []
    for name, s in shapes.items():
        backend, measured = backend_for(s.device), crossovers.get(s)
        plain = without_twin(s.device)
        options = tuple(
            TwinOption(
                str(dtype).removeprefix("torch."),
                backend.twin_bytes(s.n, s.k, dtype, s.device),
                measured.saved(twin_choice(dtype), plain) * 1e6 * s.n / measured.n,
            )
            for dtype in backend.twin_dtypes(s.dtype)
        )
        out.append(TwinCandidate(name, options))
    return out


def decide(shapes: Mapping[str, Shape], budget: Budget, mode: Mode, crossovers: Crossovers) -> Plan:
    """Measure what is not yet measured and choose twins; says once where `soft` leaves some out.

    Raises BudgetError in mode `hard` where not all fit.
    """
    if mode == "off":
        return plan([], budget, mode)
    result = plan(candidates(shapes, crossovers), budget, mode)
    if result.missed:
        wanted = result.twin_bytes + result.missed_bytes
        log.warning(
            "mode soft: %d of %d twins do not fit, %.3f GiB of %.3f GiB; those weights stay int4. %s",
            len(result.missed), len(result.missed) + len(result.twins), result.missed_bytes / GIB, wanted / GIB,
            budget.levers(wanted),
        )  # fmt: skip
    return result


def set_routes(model: nn.Module, crossovers: Crossovers, mode: Mode) -> None:
    """Give every int4 weight its routes. In mode `off` nothing about twins is measured."""
    for linear in int4_linears(model).values():
        measured = crossovers.get(shape_of(linear), with_twins=mode != "off")
        plain = without_twin(linear.packed.device)
        linear.route_without_twin = measured.route(plain)
        if linear.twin is not None:
            linear.route_with_twin = measured.route([*plain, twin_choice(linear.twin.dtype)])


def build_twins(model: nn.Module, progress: Callable[[str], None] | None = None) -> int:
    """Build the twins of the model's plan; those that exist are refreshed in place. Returns how many there are.

    Running out of memory frees the twin at hand, keeps the int4 paths from there on and says so once.
    """
    state = state_of(model)
    linears = int4_linears(model)
    built = 0
    for name, option in state.plan.twins.items():
        try:
            linears[name].build_twin(getattr(torch, option.dtype))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            linears[name].drop_twin()
            log.warning(
                "out of memory while building the twin of %s; %d of %d twins are built, the other weights stay int4",
                name, built, len(state.plan.twins),
            )  # fmt: skip
            break
        built += 1
        if progress is not None:
            progress(name)
    set_routes(model, state.crossovers, state.plan.mode)
    return built


def drop_twins(model: nn.Module) -> int:
    """Free all twins of a model; it goes on with the int4 weights. Returns the bytes freed.

    CUDA graphs captured with twins hold their addresses: capture again after this.
    """
    freed = 0
    for linear in int4_linears(model).values():
        if linear.twin is not None:
            freed += linear.twin.untyped_storage().nbytes()
            linear.drop_twin()
    return freed


def twin_bytes(model: nn.Module) -> int:
    """Bytes that the twins of a model hold now."""
    twins = [linear.twin for linear in int4_linears(model).values() if linear.twin is not None]
    return sum(t.untyped_storage().nbytes() for t in twins)


@contextmanager
def twins_in_use(model: nn.Module, use: bool) -> Iterator[None]:
    """Run without the twins (False) while they stay in memory: the two arms of a comparison on one model."""
    before = {linear: linear.use_twin for linear in int4_linears(model).values()}
    for linear in before:
        linear.use_twin = use
    try:
        yield
    finally:
        for linear, value in before.items():
            linear.use_twin = value


@contextmanager
def forced(model: nn.Module, path: Path) -> Iterator[None]:
    """Send every number of rows down one path; weights without a twin keep their route when `path` is TWIN."""
    linears = list(int4_linears(model).values())
    before = [(linear.route_without_twin, linear.route_with_twin) for linear in linears]
    for linear in linears:
        linear.route_with_twin = Route.always(path)
        if path is not Path.TWIN:
            linear.route_without_twin = Route.always(path)
    try:
        yield
    finally:
        for linear, (without, with_) in zip(linears, before, strict=True):
            linear.route_without_twin, linear.route_with_twin = without, with_
