"""`Life`: the twins of one worker, from loading its model to reloading, sleeping and waking it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from twinweight import cache, twin
from twinweight.engines.vllm import ahead, build, compat, heads, hooks, measure, metrics, own, ranks, spare, telling
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.kernel import TwinLinearKernel, kernels_of
from twinweight.engines.vllm.kinds import Kind, kind_of, shape_of
from twinweight.engines.vllm.offers import Offered, has_copy, offer, without_inner
from twinweight.engines.vllm.weight_only import weight_only
from twinweight.errors import BudgetError
from twinweight.kernels.compilers import Compilers
from twinweight.kv_cache import KVFloor
from twinweight.measured import Measured
from twinweight.memory import is_out_of_memory
from twinweight.paths import Route
from twinweight.plan import GIB, Plan, plan
from twinweight.twins import lossy_kinds

log = logging.getLogger("vllm.twinweight")

Wanted = tuple[str, str]
"""A layer's name and the form it is to have (`measured.Form.name`)."""


@dataclass(frozen=True)
class Built:
    """What a layer has besides its own weight: its form, and bytes (the least that any rank has)."""

    form: str
    nbytes: int


class Life:
    """Follows one worker object. built: the layers with a twin, an own copy or both, the most valuable bytes first.
    gone: whether sleeping threw the weights away, so that they come back by a reload. failed: whether all was given up, for an
    error. charged: bytes that vLLM counts as weights for it.
    """

    def __init__(self, worker: Any, config: Config) -> None:
        self.worker = worker
        self.config = config
        self.kernels: dict[str, TwinLinearKernel] = {}
        self.built: dict[str, Built] = {}
        self.asleep = self.gone = False
        self.kv_fixed = self.failed = False
        self.charged = 0
        self.floor = KVFloor(0, 0, 0)
        self.compilers = Compilers()

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
            hooks.of_object(self.worker, name, around)
        ahead.begin(self.compilers, self.worker, self.config)
        self.worker.twinweight_refresh = self.refresh
        self.worker.twinweight_report = self.report

    # --- loading ---

    def _load(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All weights are in place, and the KV cache is not yet sized: here twins are decided and built.

        Whatever fails in that, a server starts all the same, but in mode `hard`.
        """
        with ahead.compiling(self.compilers, self.worker, self.config):
            result = ranks.together(lambda: method(*args, **kwargs))
        self.kernels, self.built, self.charged, self.failed = {}, {}, 0, False
        try:
            ranks.together(self._decide)
        except Exception:
            if self.config.mode == "hard":
                raise
            log.exception("Twinweight failed; the server goes on with vLLM's kernels alone")
            self._go_without()
        return result

    def _decide(self) -> None:
        started = time.perf_counter()
        with compat.forward_context(self.worker):
            self.kernels = weight_only(kernels_of(self.worker.model_runner.get_model()))
            self.measured = self._measure()
            measured = time.perf_counter()
            self.floor = compat.kv_floor(self.worker, self.config.kv_floor)
            self.workload = ranks.gather(self.config.planned_for(compat.chunk(self.worker)))[0]
            self.offers = self._offers()
            self.plan = self._plan()
            self._build()
            while self._frees and spare.free(self.worker, [self.kernels[name] for name in self.built]):
                before, self.plan = self.plan, self._plan()  # for the others: what was freed has made room
                self._build()
                self.plan = replace(self.plan, twins={**before.twins, **self.plan.twins})
            heads.quicken(heads.of(self.worker), rounded=self.config.head == "int8")
        self.seconds = (measured - started, time.perf_counter() - measured)

    def _go_without(self) -> None:
        """Nothing but vLLM's kernels, and copies where those have no weight any more."""
        self.failed = True
        self._keep({name: b for name, b in self.built.items() if self.kernels[name].freed})
        if not self.built:
            self._charge(-self.charged)

    def _charge(self, nbytes: int) -> None:
        compat.charge(self.worker, nbytes)
        self.charged += nbytes

    def _measure(self) -> Mapping[Kind, Measured]:
        """Times by kind. Rank 0's, for all: ranks that differ by noise would take different paths."""
        found: Mapping[Kind, Measured] | None = {}
        if self.config.crossover is None and compat.rank() == 0:
            layers: dict[Kind, list[TwinLinearKernel]] = {}
            for kernel in self.kernels.values():
                layers.setdefault(kind_of(kernel).timed, []).append(kernel)
            try:
                ahead.finish(self.compilers)
                found = measure.known_or_measured(layers, self._lossy, cache.default(), compat.chunk(self.worker))
            except Exception:  # the other ranks wait, and a server can do without
                log.exception("Twinweight could not time the kernels")
                found = None
        found = ranks.gather(found)[0]
        if found is None and self.config.mode == "hard":
            raise BudgetError("mode hard: the kernels could not be timed, see the log", missing=0)
        return found or {}

    def _plan(self) -> Plan:
        """For layers that have nothing yet. The same on every rank: times are rank 0's and the budget is the least of all."""
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
        budget = min(ranks.gather(own), key=lambda b: b.for_twins)
        kinds = {name: kind_of(kernel) for name, kernel in self.kernels.items() if name not in self.built}
        return plan(kinds, budget, self.offers, self.workload, self.config.mode)

    def _offers(self) -> dict[Kind, Offered]:
        """What each kind of layer could have. A decode step of one sequence stays on int4, its speculated tokens included."""
        rows = compat.draft_rows(self.worker)
        least = rows + 1 if rows > 1 else 0
        given = self.config.crossover
        kernels = self._one_of_each()
        offers = {
            kind: offer(kernel, self.measured.get(kind.timed), given, least, self._lossy(kernel), len(self.kernels))
            for kind, kernel in kernels.items()
        }
        if reasons := [f"{kind}: {why}" for kind, k in kernels.items() for why in self._kinds(k)[1]]:
            log.warning("Twinweight: dense twins instead of %s for %s", self.config.dtype, "; ".join(reasons))
        return {kind: without_inner(o, self.workload) for kind, o in offers.items()} if self._frees else offers

    @property
    def _frees(self) -> bool:
        return not self.config.reload and spare.can_free(self.worker)

    def _one_of_each(self) -> dict[Kind, TwinLinearKernel]:
        return {kind_of(kernel): kernel for kernel in self.kernels.values()}

    def _kinds(self, kernel: TwinLinearKernel) -> tuple[list[str], list[str]]:
        """Of the 8-bit kinds of twins asked for: those that a layer can have, and why not the others."""
        found, reasons = lossy_kinds(shape_of(kernel), self.config.dtype)
        if not own.can_have(kernel) and (unreadable := [kind for kind in found if kind not in twin.FROM_DENSE]):
            reasons += [f"{', '.join(unreadable)}: the int4 weight cannot be read back from {type(kernel.inner).__name__}"]
            found = [kind for kind in found if kind not in unreadable]
        return found, reasons

    def _lossy(self, kernel: TwinLinearKernel) -> list[str]:
        return self._kinds(kernel)[0]

    def _route(self, kernel: TwinLinearKernel, name: str) -> Route:
        """With the form of that name."""
        offered = self.offers[kind_of(kernel)]
        return offered.route(next(f for f in offered.forms if f.name == name))

    def _build(self) -> None:
        """Build what is planned, besides what there is; without the copies that cannot be had, by another plan."""
        before, earlier = compat.memory_in_use(self.worker), self.built
        while lost := self._lost(self._ranked()):
            telling.without_copies(self, lost)
            for name in lost:
                self.kernels[name].copyable = False
            self._keep(earlier)
            self.offers = self._offers()
            self.plan = self._plan()
        if self.config.mode == "hard" and any(o.is_twin and name not in self.built for name, o in self.plan.twins.items()):
            raise BudgetError("mode hard: not all twins could be built, see the log", missing=0)
        self._charge(compat.memory_in_use(self.worker) - before)

    def _ranked(self) -> list[Wanted]:
        """What is planned, the most valuable bytes first."""
        ranked = sorted(self.plan.twins.items(), key=lambda item: -item[1].saved_us / item[1].nbytes)
        return [(name, option.name) for name, option in ranked]

    def _keep(self, built: dict[str, Built]) -> None:
        """What these layers have; the others' goes, and its memory back to the device."""
        self.built = built
        for name in self.kernels.keys() - built.keys():
            self.kernels[name].drop()
        if compat.device_of(self.worker).type != "cpu":
            compat.trim_pool(self.worker)
        compat.memory_in_use(self.worker)  # gives cached memory back

    def _lost(self, wanted: list[Wanted]) -> dict[str, str]:
        """Build; the group keeps what every rank could. The layers that cannot have a copy, on any rank, and why."""
        made, lost = self._made(wanted)
        lost = ranks.joined(lost)
        if not lost:
            self._keep_common(made)
            if compat.device_of(self.worker).type != "cpu":
                lost = ranks.joined(self._wrong(wanted))
        return lost

    def _made(self, wanted: list[Wanted]) -> tuple[dict[str, str], dict[str, str]]:
        """What this rank built, name -> form. Where copies failed: nothing, and name -> why."""
        with compat.pool(self.worker):  # once for all: every entry makes a pool with segments of its own
            ready = self._until_full(wanted, build.allocate)
        copied = self._until_full(ready, build.copy)
        why = "the weight cannot be read back exactly"
        lost = {name: why for name, form in wanted if has_copy(form) and not self.kernels[name].copyable}
        return ({}, lost) if lost else (dict(self._until_full(copied, self._fill)), {})

    def _wrong(self, wanted: list[Wanted]) -> dict[str, str]:
        """Compile what these layers' own copies need: those for which our kernels compute something else on this GPU."""
        copies = {name: kernel for name, _ in wanted if name in self.built and (kernel := self.kernels[name]).own is not None}
        tried = {(kind_of(kernel), *kernel.route): kernel for kernel in copies.values()}
        own.compile_paths(tried.values(), compat.chunk(self.worker))
        wrong = {kind for (kind, *_), kernel in tried.items() if not own.agrees(kernel)}
        return {name: "our kernels compute something else" for name, kernel in copies.items() if kind_of(kernel) in wrong}

    def _keep_common(self, forms: Mapping[str, str]) -> None:
        """Keep of what this rank built, name -> form, what all did, and count the bytes that are really there."""
        everywhere = ranks.gather(forms)
        common = {name: form for name, form in forms.items() if all(found.get(name) == form for found in everywhere)}
        for name in forms.keys() - common.keys():
            self.kernels[name].drop()
        sizes = ranks.gather({name: own.held_bytes(self.kernels[name]) for name in common})
        self.built = self.built | {name: Built(form, min(held[name] for held in sizes)) for name, form in common.items()}

    def _until_full(self, wanted: list[Wanted], make: Callable[[TwinLinearKernel, str], bool]) -> list[Wanted]:
        """Those of (name, form) that were made before memory ran out, if it did; others stay int4."""
        done: list[Wanted] = []
        for count, (name, form) in enumerate(wanted):
            try:
                made = make(self.kernels[name], form)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                for rest, _ in wanted[count:]:
                    self.kernels[rest].drop()
                log.warning("Twinweight: out of memory while building the twin of %s, the rest stays int4", name)
                break
            if made:
                done.append((name, form))
            else:
                self.kernels[name].drop()
        return done

    def _fill(self, kernel: TwinLinearKernel, form: str) -> bool:
        """Write a kind of twin, besides an own copy or not, and the bias."""
        try:
            build.fill(kernel)
        except build.Unreadable as error:
            log.warning("Twinweight: no %s twin: %s", form, error)
            return False
        kernel.route = self._route(kernel, form).flat()
        return True

    # --- sizing the KV cache ---

    def _size(self, method: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        """The plan's reserves were estimates; now the peak is known. Where the KV floor does not hold, twins go until it does.

        No graph of the server is captured yet, so nothing holds the address of a twin.
        """
        if self.failed:
            return ranks.together(lambda: method(*args, **kwargs))
        given = compat.explicit_kv_bytes(self.worker)
        if given is not None and compat.device_of(self.worker).type == "cpu":  # there vLLM looks before it says what it takes
            self._make_room(max(ranks.gather(given - compat.free_memory(self.worker))))
        with compat.forward_peak(self.worker) as peak:
            available = ranks.together(lambda: method(*args, **kwargs))
        fixed = compat.explicit_kv_bytes(self.worker) is not None
        if not fixed:
            available += self._make_room(max(ranks.gather(self.floor.nbytes - available)))
            compat.set_available(self.worker, available)
        elif compat.device_of(self.worker).type != "cpu":
            needed = available + peak() + compat.graphs_bytes(self.worker)
            self._make_room(max(ranks.gather(needed - compat.free_memory(self.worker))))
        self.kv_fixed = fixed
        if compat.rank() == 0:
            telling.start_up(self, available, fixed=fixed)
        metrics.publish(self.worker, self.status)
        return available

    def _make_room(self, short: int) -> int:
        """Drop twins, the least valuable first, until `short` bytes are free. Returns the bytes freed, equal on all ranks."""
        dropped: set[str] = set()
        freed = 0
        for name in reversed([name for name in self.built if not self.kernels[name].freed]):
            if freed >= short:
                break
            dropped.add(name)
            freed += self.built[name].nbytes
        if not freed:
            return 0
        if self.config.mode == "hard":
            raise BudgetError(f"mode hard: the KV floor is {short / GIB:.3f} GiB short with all twins", missing=short)
        self._keep({name: b for name, b in self.built.items() if name not in dropped})
        self._charge(-freed)
        log.warning("Twinweight dropped %d twins, %.3f GiB, to keep the KV floor of %d tokens", len(dropped), freed / GIB,
                    self.floor.tokens)  # fmt: skip
        return freed

    # --- new weights ---

    def refresh(self) -> int:
        """Refill every twin in place: after parameters were written past vLLM (`collective_rpc("twinweight_refresh")`)."""
        for name in self.built:
            self.kernels[name].fresh = False
        heads.refresh(heads.of(self.worker))
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
        self.gone = False
        if not self.asleep:
            self._refill()
            heads.quicken(heads.of(self.worker), rounded=self.config.head == "int8")
        return result

    def _sleep(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Twins have a memory tag of their own, which no level copies to the host."""
        result = method(*args, **kwargs)
        self.gone = 2 in (*args, kwargs.get("level")) or (self.asleep and self.gone)
        self.asleep = compat.device_of(self.worker).type != "cpu"
        return result

    def _wake(self, method: Callable[..., Any], tags: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Refill once the weights are back, here or by a reload; a twin is not touched while its memory is unmapped."""
        result = method(tags, *args, **kwargs)
        if self.asleep and (tags is None or "weights" in tags):
            if tags is not None and not compat.wakes_alone():
                compat.wake_pool(self.worker)
            if not self.gone:
                self.refresh()
            self.asleep = False
        return result

    def _discard(self, method: Callable[..., Any], tags: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        """Where weights are thrown away, twins go with them, and come back when they do."""
        gone = "weights" in tags
        result = method((*tags, compat.POOL) if gone else tags, *args, **kwargs)
        self.asleep, self.gone = self.asleep or gone, self.gone or gone
        return result

    # --- for tests and support ---

    def status(self) -> dict[str, Any]:
        """What `/metrics` shows of this worker."""
        return telling.status(self)

    def report(self, check: bool = False) -> str:
        """JSON: what a worker has (`telling.report`)."""
        return telling.report(self, check)


def _mib(given: int | None, estimate: Callable[[], int]) -> int:
    return estimate() if given is None else given << 20
