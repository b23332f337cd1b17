"""`Life`: the twins of one worker, from loading its model to reloading, sleeping and waking it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from twinweight import cache, paths
from twinweight.engines.vllm import build, compat, heads, measure, metrics, own
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.kernel import TwinLinearKernel, kernels_of
from twinweight.engines.vllm.measure import Kind, kind_of
from twinweight.engines.vllm.weight_only import weight_only
from twinweight.errors import BudgetError
from twinweight.measured import Costs, Measured
from twinweight.memory import is_out_of_memory
from twinweight.paths import Path, Route
from twinweight.plan import GIB, MARGIN, Plan, plan
from twinweight.twins import lossy_kinds
from twinweight.workload import Workload

log = logging.getLogger("vllm.twinweight")

Wanted = tuple[str, str]
"""A layer's name and the form it is to have (`measured.Form.name`)."""


class Life:
    """Follows one worker object. built: names of layers with a twin, an own copy or both, the most valuable bytes first."""

    def __init__(self, worker: Any, config: Config) -> None:
        self.worker = worker
        self.config = config
        self.kernels: dict[str, TwinLinearKernel] = {}
        self.built: list[str] = []
        self.asleep = False
        self.kv_fixed = False

    def follow(self) -> None:
        """Install the kernel class and wrap the worker's methods that load, size, reload, put to sleep and wake."""
        compat.prefer(TwinLinearKernel)
        for name, around in {
            "load_model": self._load,
            "determine_available_memory": self._size,
            "reload_weights": self._reload,
            "finish_weight_update": self._reload,
            "sleep": self._sleep,
            "discard": self._discard,
            "wake_up": self._wake,
        }.items():
            compat.wrap(self.worker, name, around)
        self.worker.twinweight_refresh = self.refresh
        self.worker.twinweight_report = self.report

    # --- loading ---

    def _load(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All weights are in place, and the KV cache is not yet sized: here twins are decided and built."""
        result = method(*args, **kwargs)
        self.built = []
        started = time.perf_counter()
        with compat.forward_context(self.worker):
            self.kernels = weight_only(kernels_of(self.worker.model_runner.get_model()))
            self.offers = self._offers(self._measure())
            measured = time.perf_counter()
            self.floor = compat.kv_floor(self.worker, self.config.kv_floor)
            self.workload = compat.gather(self.config.planned_for(compat.chunk(self.worker)))[0]
            self.plan = self._plan()
            self._build()
            heads.quicken(compat.cpu_heads(self.worker))
        self.seconds = (measured - started, time.perf_counter() - measured)
        return result

    def _measure(self) -> Mapping[Kind, Measured]:
        """Times by kind. Rank 0's, for all: ranks that differ by noise would take different paths."""
        found: Mapping[Kind, Measured] | None = {}
        if self.config.crossover is None and compat.rank() == 0:
            layers: dict[Kind, list[TwinLinearKernel]] = {}
            for kernel in self.kernels.values():
                layers.setdefault(kind_of(kernel), []).append(kernel)
            try:
                found = measure.known_or_measured(layers, self._lossy, cache.default())
            except (RuntimeError, MemoryError):
                log.exception("Twinweight could not time the kernels")
                found = None
        found = compat.gather(found)[0]
        if found is None and self.config.mode == "hard":
            raise BudgetError("mode hard: the kernels could not be timed, see the log", missing=0)
        return found or {}

    def _plan(self) -> Plan:
        """The same on every rank: times are rank 0's and the budget is the least of all."""
        layers = self._one_of_each().values()
        transient = max((build.transient_bytes(k.n, k.k, lossy=bool(self._lossy(k))) for k in layers), default=0)
        widest = max((max(k.n, k.k) for k in self.kernels.values()), default=0)
        reserves = (
            ("activations", _mib(self.config.activation_reserve_mib, lambda: compat.activation_bytes(self.worker, widest))),
            ("CUDA graphs", _mib(self.config.graphs_reserve_mib, lambda: compat.graphs_bytes(self.worker))),
        )
        fixed = compat.explicit_kv_bytes(self.worker)
        floor, unknown = (self.floor.nbytes, self.config.kv_floor is None) if fixed is None else (fixed, False)
        own = compat.budget(self.worker, floor, transient, reserves, kv_unknown=unknown)
        budget = min(compat.gather(own), key=lambda b: b.for_twins)
        kinds = {name: kind_of(kernel) for name, kernel in self.kernels.items()}
        return plan(kinds, budget, self.offers, self.workload, self.config.mode)

    def _offers(self, measured: Mapping[Kind, Measured]) -> dict[Kind, measure.Offered]:
        """What each kind of layer could have. A decode step of one sequence stays on int4, its speculated tokens included."""
        rows = compat.draft_rows(self.worker)
        least = rows + 1 if rows > 1 else 0
        given = self.config.crossover
        kernels = self._one_of_each()
        offers = {kind: measure.offer(k, measured.get(kind), given, least, self._lossy(k)) for kind, k in kernels.items()}
        if reasons := [f"{kind}: {why}" for kind, k in kernels.items() for why in self._kinds(k)[1]]:
            log.warning("Twinweight: dense twins instead of %s for %s", self.config.dtype, "; ".join(reasons))
        return offers

    def _one_of_each(self) -> dict[Kind, TwinLinearKernel]:
        return {kind_of(kernel): kernel for kernel in self.kernels.values()}

    def _kinds(self, kernel: TwinLinearKernel) -> tuple[list[str], list[str]]:
        """Of the 8-bit kinds of twins asked for: those that a layer can have, and why not the others."""
        found, reasons = lossy_kinds(measure.shape_of(kernel), self.config.dtype)
        if found and not own.can_have(kernel):
            return [], [f"{', '.join(found)}: the int4 weight cannot be read back from {type(kernel.inner).__name__}"]
        return found, reasons

    def _lossy(self, kernel: TwinLinearKernel) -> list[str]:
        return self._kinds(kernel)[0]

    def _route(self, kernel: TwinLinearKernel, name: str) -> Route:
        """With the form of that name."""
        offered = self.offers[kind_of(kernel)]
        return offered.route(next(f for f in offered.forms if f.name == name))

    def _build(self) -> None:
        """Build what is planned, the most valuable bytes first; the group keeps what every rank could build."""
        before = compat.memory_in_use(self.worker)
        ranked = sorted(((name, o.name, o.saved_us / o.nbytes) for name, o in self.plan.twins.items()), key=lambda t: -t[2])
        with compat.pool(self.worker):  # once for all: every entry makes a pool with segments of its own
            ready = self._until_full([(name, form) for name, form, _ in ranked], _allocate)
        self.built = [name for name, _ in self._until_full(ready, self._fill)]
        self._keep(min(compat.gather(len(self.built))))
        if compat.device_of(self.worker).type != "cpu":
            self._try_copies()
        if self.config.mode == "hard" and len(self.built) < len(ranked):
            raise BudgetError("mode hard: out of memory while building twins", missing=0)
        compat.charge(self.worker, compat.memory_in_use(self.worker) - before)

    def _try_copies(self) -> None:
        """Compile what own copies need, and do without them where our kernels compute something else, on any rank."""
        copies = {name: k for name in self.built if (k := self.kernels[name]).own is not None}
        tried = {(kind_of(kernel), *kernel.route): kernel for kernel in copies.values()}
        own.compile_paths(tried.values())
        wrong = {str(kind) for (kind, *_), kernel in tried.items() if not own.agrees(kernel)}
        wrong.update(*compat.gather(wrong))
        if not wrong:
            return
        log.warning("Twinweight: our kernels compute something else than %s; no own copies there", ", ".join(sorted(wrong)))
        for name, kernel in copies.items():
            twin = _twin_of(self.plan.twins[name].name)
            if str(kind_of(kernel)) in wrong and twin is not None:
                kernel.own, kernel.route = None, self._route(kernel, twin).flat()
            elif str(kind_of(kernel)) in wrong:
                kernel.drop()
                self.built.remove(name)

    def _until_full(self, wanted: list[Wanted], make: Callable[[TwinLinearKernel, str], None]) -> list[Wanted]:
        """Those of (name, form) that were made before memory ran out, if it did; the others stay int4."""
        for count, (name, form) in enumerate(wanted):
            try:
                make(self.kernels[name], form)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                for rest, _ in wanted[count:]:
                    self.kernels[rest].drop()
                log.warning("Twinweight: out of memory while building the twin of %s, the rest stays int4", name)
                return wanted[:count]
        return wanted

    def _fill(self, kernel: TwinLinearKernel, form: str) -> None:
        """A form is a kind of twin, an own copy, or "own+<kind>"; without the copy where that would not be exact."""
        made = own.make(kernel) if measure.OWN in form.split("+") else None
        if made is not None:
            with compat.pool(self.worker):  # only what stays: making it took temporaries
                kernel.own = made if kernel.device.type == "cpu" else made.clone()
        build.fill(kernel)
        kind = _twin_of(form)
        if made is not None or kind is not None:
            kernel.route = self._route(kernel, form if made is not None else str(kind)).flat()

    def _keep(self, count: int) -> None:
        for name in self.built[count:]:
            self.kernels[name].drop()
        del self.built[count:]

    # --- sizing the KV cache ---

    def _size(self, method: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        """The plan's reserves were estimates; now the peak is known. Where the KV floor does not hold, twins go until it does.

        No graph of the server is captured yet, so nothing holds the address of a twin.
        """
        given = compat.explicit_kv_bytes(self.worker)
        if given is not None and compat.device_of(self.worker).type == "cpu":  # there vLLM looks before it says what it takes
            self._make_room(max(compat.gather(given - compat.free_memory(self.worker))))
        with compat.forward_peak(self.worker) as peak:
            available = method(*args, **kwargs)
        fixed = compat.explicit_kv_bytes(self.worker) is not None
        if not fixed:
            available += self._make_room(max(compat.gather(self.floor.nbytes - available)))
            compat.set_available(self.worker, available)
        elif compat.device_of(self.worker).type != "cpu":
            needed = available + peak() + compat.graphs_bytes(self.worker)
            self._make_room(max(compat.gather(needed - compat.free_memory(self.worker))))
        self.kv_fixed = fixed
        if compat.rank() == 0:
            self._say(available, fixed)
        metrics.publish(self.worker, self.status)
        return available

    def _make_room(self, short: int) -> int:
        """Drop twins, the least valuable first, until `short` bytes are free. Returns the bytes freed, equal on all ranks."""
        count, freed = len(self.built), 0
        while count and freed < short:
            count -= 1
            freed += self.plan.twins[self.built[count]].nbytes
        if not freed:
            return 0
        if self.config.mode == "hard":
            raise BudgetError(f"mode hard: the KV floor is {short / GIB:.3f} GiB short with all twins", missing=short)
        dropped = len(self.built) - count
        self._keep(count)
        compat.memory_in_use(self.worker)  # gives cached memory back to the device
        compat.charge(self.worker, -freed)
        log.warning("Twinweight dropped %d twins, %.3f GiB, to keep the KV floor of %d tokens", dropped, freed / GIB,
                    self.floor.tokens)  # fmt: skip
        return freed

    def _say(self, available: int, fixed: bool) -> None:
        """The one line of a start-up."""
        planned = {**self.plan.twins, **self.plan.missed}
        held = sum(planned[name].nbytes for name in self.built)
        wanted = sum(o.nbytes for o in planned.values())
        tokens = ""
        if self.floor.per_token:
            with_, without = available / self.floor.per_token, (available + (0 if fixed else held)) / self.floor.per_token
            tokens = f"; KV cache {int(with_)} tokens, {int(without)} without twins, floor {self.floor.tokens}"
        routes = "; ".join(f"{kind}: {route}" for kind, route in self.routes().items()) or "no W4A16 layer"
        log.info(
            "Twinweight %s: %s built, %d missed, %.3f of %.3f GiB a rank%s%s; measured in %.1f s, built in %.1f s; %s",
            self.config.mode, self._held(), len(planned) - len(self.built), held / GIB, wanted / GIB, tokens,
            self._gain(), *self.seconds, routes,
        )  # fmt: skip
        if self.plan.missed:
            budget = self.plan.budget
            log.info("Twinweight: not all twins fit\n%s\n%s", budget.arithmetic(wanted), budget.levers(wanted))

    def _counts(self) -> tuple[int, int]:
        """Layers with a twin, and with an int4 copy."""
        built = [self.kernels[name] for name in self.built]
        return sum(k.twin is not None for k in built), sum(k.own is not None for k in built)

    def _held(self) -> str:
        twins, copies = self._counts()
        return f"{twins} twins and {copies} int4 copies" if copies else f"{twins} twins"

    def _gain(self) -> str:
        """What the twins save in a step of prefill, by the times that were measured; nothing where none were."""
        rows = max(m for m, _ in self.workload.calls)
        step, without, with_ = Workload.prefill(rows), 0.0, 0.0
        for name, kernel in self.kernels.items():
            offer = self.offers[kind_of(kernel)]
            if not isinstance(offer, Costs):
                return ""
            without += offer.seconds(None, step)
            form = self.plan.twins[name].name if name in self.built else None
            with_ += offer.seconds(next((f for f in offer.forms if f.name == form), None), step)
        if not without:
            return ""
        if not self.plan.twins and not self.plan.missed:
            return f"; no twins: {self.plan.refused or f'none saves {MARGIN:.0%} of the calls that it would serve'}"
        more = f"; {self.plan.refused}" if self.plan.refused else ""
        return f"; W4A16 layers of a step of {rows} tokens {without * 1e3:.1f} -> {with_ * 1e3:.1f} ms{more}"

    def routes(self) -> dict[str, str]:
        """Which rows take which path, by kind of layer; where only some of a kind have a twin, theirs."""
        found = {str(kind_of(k)): Route.always(Path.INT4) for k in self.kernels.values()}
        for name in self.built:
            flat = self.kernels[name].route
            found[str(kind_of(self.kernels[name]))] = Route(tuple(flat[::2]), tuple(Path(p) for p in flat[1::2]))
        return {kind: str(route) for kind, route in found.items()}

    # --- new weights ---

    def refresh(self) -> int:
        """Refill every twin in place: after parameters were written past vLLM (`collective_rpc("twinweight_refresh")`)."""
        for name in self.built:
            self.kernels[name].fresh = False
        return self._refill()

    def _refill(self) -> int:
        stale = [self.kernels[name] for name in self.built if not self.kernels[name].fresh]
        with compat.forward_context(self.worker):
            for kernel in stale:
                kernel.refill()
        return len(stale)

    def _reload(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layerwise reload fills twins as layers are processed; any other only copies into parameters."""
        for name in self.built:
            self.kernels[name].fresh = False
        result = method(*args, **kwargs)
        if not self.asleep:
            self._refill()
            heads.quicken(compat.cpu_heads(self.worker))
        return result

    def _sleep(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Twins have a memory tag of their own, which no level copies to the host."""
        result = method(*args, **kwargs)
        self.asleep = compat.device_of(self.worker).type != "cpu"
        return result

    def _wake(self, method: Callable[..., Any], tags: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refill once the weights are back; a twin is not touched while its memory is unmapped."""
        result = method(tags, *args, **kwargs)
        if self.asleep and (tags is None or "weights" in tags):
            if tags is not None and not compat.wakes_alone():
                compat.wake_pool(self.worker)
            self.asleep = False
            self.refresh()
        return result

    def _discard(self, method: Callable[..., Any], tags: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        """Where weights are thrown away, twins go with them, and come back when they do."""
        gone = "weights" in tags
        result = method((*tags, compat.POOL) if gone else tags, *args, **kwargs)
        self.asleep = self.asleep or gone
        return result

    # --- for tests and support ---

    def status(self) -> dict[str, Any]:
        """What `/metrics` shows of this worker."""
        planned = {**self.plan.twins, **self.plan.missed}
        held = sum(planned[name].nbytes for name in self.built)
        calls: dict[str, dict[str, int]] = {}
        for (path, rows), count in sorted(paths.calls.copy().items()):
            calls.setdefault(Path(path).name.lower(), {})[str(rows)] = count
        tokens = 0 if self.kv_fixed or not self.floor.per_token else int(held / self.floor.per_token)
        twins, copies = self._counts()
        missed = len(planned) - len(self.built)
        return {"twins": twins, "copies": copies, "missed": missed, "bytes": held, "kv_tokens": tokens, "calls": calls}

    def report(self, check: bool = False) -> str:
        """JSON: twins by name (dtype, address, with `check` whether it is exact), own copies, calls by path, inner kernels,
        routes, output heads on CPUs (whether a single row goes without oneDNN).
        """
        with compat.forward_context(self.worker):
            twins = {
                name: {
                    "dtype": self.plan.twins[name].dtype,
                    "address": t.data_ptr(),
                    "exact": build.is_exact(self.kernels[name]) if check and self.kernels[name].twin_scales is None else None,
                }
                for name in self.built
                if (t := self.kernels[name].twin) is not None
            }
        calls = {f"{Path(path).name.lower()}@{m}": count for (path, m), count in sorted(paths.calls.items())}
        inner = {name: type(k.inner).__name__ for name, k in self.kernels.items()}
        return json.dumps({
            "twins": twins, "copies": self._counts()[1], "bytes": self.status()["bytes"], "calls": calls, "inner": inner,
            "routes": self.routes(), "kv_floor": self.floor.tokens, "heads": heads.chosen(compat.cpu_heads(self.worker)),
        })  # fmt: skip


def _twin_of(form: str) -> str | None:
    return next((part for part in form.split("+") if part != measure.OWN), None)


def _allocate(kernel: TwinLinearKernel, form: str) -> None:
    build.allocate(kernel, _twin_of(form))


def _mib(given: int | None, estimate: Callable[[], int]) -> int:
    return estimate() if given is None else given << 20
