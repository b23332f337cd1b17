"""The twins of a whole model: candidates for the plan, routes, building, dropping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from twinweight import twin
from twinweight.crossover import Crossovers, Shape, twin_choice
from twinweight.errors import ConfigError
from twinweight.formats.common import is_head
from twinweight.linear import Int4Linear
from twinweight.measured import Costs, Form, Measured
from twinweight.memory import is_out_of_memory
from twinweight.paths import Path, Route
from twinweight.plan import GIB, Budget, Mode, Plan, plan
from twinweight.workload import Workload

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


def lossy_kinds(shape: Shape, request: str) -> tuple[list[str], list[str]]:
    """Of the 8-bit kinds asked for (`twin.REQUESTS`): those that a weight of this shape can have, and why not the others."""
    found, reasons = [], []
    for kind in twin.REQUESTS[request]:
        reason = twin.refusal(kind, shape.n, shape.k, shape.group_size, shape.act_order, shape.device)
        found += [kind] if reason is None else []
        reasons += [f"{kind}: {reason}"] if reason is not None else []
    return found, reasons


def costs_of(shape: Shape, crossovers: Crossovers, lossy: Sequence[str] = ()) -> Costs:
    """The twins a weight of this shape could have, with the measured times that say what each is worth. lossy: 8-bit kinds."""
    measured = crossovers.get(shape, lossy=lossy)
    twins = tuple(
        Form(kind, twin.nbytes(kind, shape.n, shape.k, shape.device), measured.with_twin(twin_choice(kind)))
        for kind in (*twin.dense_kinds(shape.dtype, shape.device), *lossy)
    )
    return Costs(measured, Form("none", 0, measured.plain), twins, shape.n)


def decide(
    shapes: Mapping[str, Shape],
    budget: Budget,
    mode: Mode,
    crossovers: Crossovers,
    workload: Workload | None = None,
    request: str = "dense",
) -> Plan:
    """Measure what is not yet measured and choose twins; says once where `soft` leaves some out, or where 8 bits do not go.

    workload: the rows of calls to choose for; None is `Workload.prefill()`. request: 8-bit kinds besides (`twin.REQUESTS`). An
    int4 output head gets no twin: of a prompt it multiplies the last row.
    Raises BudgetError in mode `hard` where not all fit.
    """
    if mode == "off":
        return Plan(mode, budget, {}, {})
    shapes = {name: shape for name, shape in shapes.items() if not is_head(name)}
    distinct = {shape: lossy_kinds(shape, request) for shape in dict.fromkeys(shapes.values())}
    dense = [shape for shape in shapes.values() if request != "dense" and not distinct[shape][0]]
    if dense:
        reasons = dict.fromkeys(reason for shape in dense for reason in distinct[shape][1])
        log.warning("%d of %d weights get dense twins, not %s. %s", len(dense), len(shapes), request, "; ".join(reasons))
    crossovers.compile(distinct)
    costs = {shape: costs_of(shape, crossovers, kinds) for shape, (kinds, _) in distinct.items()}
    result = plan(shapes, budget, costs, workload or Workload.prefill(), mode)
    if result.missed:
        wanted = result.twin_bytes + result.missed_bytes
        log.warning(
            "mode soft: %d of %d twins do not fit, %.3f GiB of %.3f GiB; those weights stay int4. %s",
            len(result.missed), len(result.missed) + len(result.twins), result.missed_bytes / GIB, wanted / GIB,
            budget.levers(wanted, mode=mode),
        )  # fmt: skip
    return result


def set_routes(model: nn.Module, crossovers: Crossovers, mode: Mode) -> None:
    """Give every int4 weight its routes. In mode `off` nothing about twins is measured."""
    routes: dict[tuple[Shape, str | None], tuple[Route, Route]] = {}
    for linear in int4_linears(model).values():
        key = shape, kind = shape_of(linear), linear.twin_kind
        if key not in routes:
            measured = crossovers.get(shape, with_twins=mode != "off", lossy=[kind] if kind in twin.LOSSY else ())
            without = measured.route(_plain(measured, mode))
            routes[key] = without, measured.route(measured.with_twin(twin_choice(kind))) if kind is not None else without
        linear.route_without_twin, linear.route_with_twin = routes[key]


def _plain(measured: Measured, mode: Mode) -> list[str]:
    """The choices of a weight without a twin; nothing is expanded in mode `off`."""
    return [c for c in measured.plain if mode != "off" or c != "stream"]


def build_twins(model: nn.Module, progress: Callable[[str], None] | None = None) -> int:
    """Build the twins of the model's plan; those that exist are refreshed in place. Returns how many there are.

    Running out of memory frees the twin at hand, keeps the int4 paths from there on and says so once.
    """
    state = state_of(model)
    linears = int4_linears(model)
    built = 0
    for name, option in state.plan.twins.items():
        try:
            linears[name].build_twin(option.dtype)
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
        freed += linear.twin_bytes
        linear.drop_twin()
    return freed


def twin_bytes(model: nn.Module) -> int:
    """Bytes that the twins of a model hold now."""
    return sum(linear.twin_bytes for linear in int4_linears(model).values())


@contextmanager
def twins_in_use(model: nn.Module, use: bool) -> Iterator[None]:
    """Run as in mode `off` (False) while the twins stay in memory: the two arms of a comparison on one model."""
    before = {linear: (linear.use_twin, linear.route_without_twin) for linear in int4_linears(model).values()}
    crossovers = state_of(model).crossovers
    for linear, (_, route) in before.items():
        linear.use_twin = use
        if not use and Path.STREAM in route.paths:
            measured = crossovers.get(shape_of(linear))
            linear.route_without_twin = measured.route(_plain(measured, "off"))
    try:
        yield
    finally:
        for linear, (value, route) in before.items():
            linear.use_twin, linear.route_without_twin = value, route


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
