"""`plan`: which weights get a twin. A pure function of sizes, measured times, a workload and a budget; no device is touched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, cast, get_args

from twinweight.asked import one_of
from twinweight.errors import BudgetError, ConfigError
from twinweight.knapsack import Item, solve
from twinweight.workload import Workload

Mode = Literal["off", "soft", "hard"]
GIB = 1 << 30
MARGIN = 0.02
"""What a path must win by at least, what a twin must save of the calls that it serves, and all twins together of theirs.

Calls are timed alone; in a server clocks and caches differ, and the KV cache can use the memory. On an H200 twins that had won
alone, by however little, made half of qwen3-32b's prefills 0.3 to 0.9 % slower than Machete did; those of llama-3.3-70b took a
quarter of the KV cache to save 0.05 % of a step; and those of a quarter of qwen3-32b's layers, 2 % each, saved 0.2 % of it.
"""
CACHE_PRICE = 0.2
"""What a twin must save in mode `soft`, as a share of the linear layers' time, per share of the KV cache that it takes. The
first `MARGIN` of its calls does not count: calls timed alone may be wrong by that much.

A fifth: twins that take half of the cache must save a tenth. On an H200 half of qwen3-32b's cache had gone for 2.06 % of a
step, and one of its prompts came 1.1 % later; and a fifth of llama-3.3-70b's, on humming, for 4.24 %, of which servers showed
0.4 to 1.7 %, and one of six points came 8 % later. Where all twins are larger than the cache it is a share of those: what
saves half of the time is worth little memory, too.

That is the price of the first byte. Where nobody said how much of the cache is needed (`Budget.kv_unknown`), it rises with the
square of how much smaller the cache has become: fewer requests fit at once, and a full server takes so many times as long.
"""


def check_mode(value: str) -> Mode:
    """`value` as a `Mode`; raises ConfigError naming the modes."""
    return cast(Mode, one_of("mode", value, get_args(Mode)))


NONE_PAYS = "no twin saves time in calls of these sizes"
_CALLED = {True: ("twin", "twins"), False: ("int4 copy", "int4 copies")}


@dataclass(frozen=True)
class TwinOption:
    """Something derived that a weight could have: a twin of some dtype, or a copy that opens another path.

    name: a twin's dtype ("bfloat16"), or what the copy is called. nbytes: padding included. saved_us: microseconds it saves in
    an average call of the workload, against the best path without it; at most 0 where it does not pay.
    """

    name: str
    nbytes: int
    saved_us: float
    is_twin: bool = True

    @property
    def dtype(self) -> str:
        """The dtype of a twin."""
        return self.name


@dataclass(frozen=True)
class TwinCandidate:
    """One weight and its options (several dtypes)."""

    name: str
    options: tuple[TwinOption, ...]


class Offer(Protocol):
    """What one kind of weight could have."""

    def options(self, workload: Workload) -> tuple[TwinOption, ...]:
        """Each form with its bytes and what it saves under a workload."""

    def gains(self, workload: Workload) -> Mapping[int, tuple[float, float]]:
        """Rows of the workload's calls -> (microseconds of an average call without any form, the most that a form which pays
        saves of them); empty where nothing was timed.
        """


@dataclass(frozen=True)
class Budget:
    """Bytes, read once, from which everything else is computed.

    total, free: of the device, `free` when the int4 weights are in place. utilization: share of `total` that may be used at
    all.
    transient: peak of temporaries while a twin is built. kv_floor: KV cache that twins may never take.
    reserves: what else must stay free, by name (activations, graphs, scratch).
    weights: what the model's weights take, out of `free` already.
    kv_unknown: many requests share the cache, and the floor is what one of them needs: nobody said how much they all do.
    """

    total: int
    free: int
    utilization: float = 0.9
    transient: int = 0
    kv_floor: int = 0
    reserves: tuple[tuple[str, int], ...] = ()
    weights: int = 0
    kv_unknown: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"utilization is {self.utilization}, expected above 0 and at most 1")

    @property
    def untouchable(self) -> int:
        """total x (1 - utilization): left to other processes and the driver."""
        return round(self.total * (1 - self.utilization))

    @property
    def spendable(self) -> int:
        """What twins and the KV cache share: free - total x (1 - utilization), never below 0."""
        return max(0, self.free - self.untouchable)

    @property
    def left(self) -> int:
        """What is left of `free` by the arithmetic; below 0 where the rest alone is too much."""
        return self.kv_bytes(0) - self.kv_floor - self.transient

    @property
    def for_twins(self) -> int:
        """What twins may use: the spendable bytes less the KV floor, the reserves and the transient of building one."""
        return max(0, self.left)

    def kv_bytes(self, twin_bytes: int) -> int:
        """What is left for the KV cache beside twins; below 0 where weights and reserves alone are too much."""
        return self.free - self.untouchable - sum(n for _, n in self.reserves) - twin_bytes

    def lines(self) -> dict[str, int]:
        """Bytes by line; "for twins" is what the others leave."""
        return {
            "total": self.total,
            "kept free": self.untouchable,
            "weights": self.weights,
            "in use by others": max(0, self.total - self.free - self.weights),
            **dict(self.reserves),
            "peak of building a twin": self.transient,
            "KV floor": self.kv_floor,
            "for twins": self.for_twins,
        }

    def arithmetic(self, wanted: int) -> str:
        """The sum that decides, line by line, with the bytes that all twins would need."""
        rows = [
            *([("total", self.total), ("weights", -self.weights)] if self.weights else []),
            ("free memory", self.free),
            (f"kept free: total {self.total / GIB:.2f} GiB x (1 - utilization {self.utilization:g})", -self.untouchable),
            ("KV floor", -self.kv_floor),
            *((f"reserve for {name}", -nbytes) for name, nbytes in self.reserves),
            ("peak of building a twin", -self.transient),
            ("left for twins", self.left),
            ("all twins need", wanted),
        ]
        return "\n".join(f"  {label:<58}{nbytes / GIB:>10.3f} GiB" for label, nbytes in rows)

    def levers(self, wanted: int, more: Sequence[tuple[int, str]] = (), mode: Mode = "hard", short: int | None = None) -> str:
        """The three settings that would make room, biggest first, and none that frees nothing. more: others, with the bytes
        that each could free. short: what is missing, where twins are not the reason.
        """
        short = wanted - self.left if short is None else short
        options = [
            *more,
            (self.untouchable, "raise utilization"),
            (self.kv_floor, "lower the KV floor"),
            *([(wanted, "use mode soft or off")] if mode == "hard" else []),
            *((nbytes, f"lower the reserve for {name}") for name, nbytes in self.reserves),
        ]
        held = max(0, self.total - self.free - self.weights - self.untouchable)
        options.append((held, "free memory that other processes or models hold"))
        ranked = [f"{what} (up to {n / GIB:.2f} GiB)" for n, what in sorted(options, reverse=True)[:3] if n / GIB >= 0.005]
        return "; ".join([f"{short / GIB:.3f} GiB short", *ranked])


@dataclass(frozen=True)
class Plan:
    """What was decided. twins: weight name -> its option; missed: weights whose twin pays but does not fit.

    gap: share by which another choice could at most save more; 0 is proven best. refused: why twins that would fit and gain
    something are not worth it, where there are some.
    """

    mode: Mode
    budget: Budget
    twins: dict[str, TwinOption]
    missed: dict[str, TwinOption]
    gap: float = 0.0
    refused: str = ""

    @property
    def twin_bytes(self) -> int:
        """Bytes of all planned twins."""
        return sum(o.nbytes for o in self.twins.values())

    @property
    def missed_bytes(self) -> int:
        """Bytes that the missed twins would need."""
        return sum(o.nbytes for o in self.missed.values())

    @property
    def saved_us(self) -> float:
        """Microseconds that all planned twins save in an average call of each weight."""
        return sum(o.saved_us for o in self.twins.values())


Kind = TypeVar("Kind", bound=Hashable)


def plan(weights: Mapping[str, Kind], budget: Budget, crossovers: Mapping[Kind, Offer], workload: Workload, mode: Mode) -> Plan:
    """Choose the twins that save the most time under a workload, within a budget.

    weights: name -> kind, in module order; crossovers: what each kind could have and would save (`measured.Costs`). None is
    chosen where all together would save less than `MARGIN` of the calls that they serve, and `soft` chooses none that saves
    less, beyond `MARGIN` of its calls, than `CACHE_PRICE` asks for its bytes.
    See `choose` for modes and errors.
    """
    most = None
    if mode == "off" or not weights:
        return Plan(mode, budget, {}, {})
    counts = Counter(weights.values())
    options = {kind: crossovers[kind].options(workload) for kind in counts}
    if not any(o.saved_us > 0 for found in options.values() for o in found):
        return Plan(mode, budget, {}, {}, refused=NONE_PAYS)
    if (times := _served(counts, crossovers, workload)) is not None:
        without, saved = (math.fsum(n * times[kind][i] for kind, n in counts.items()) for i in (0, 1))
        share = f"twins would save {saved / without:.1%} of the linear layers' time in the calls they serve"
        if saved < MARGIN * without:
            return Plan(mode, budget, {}, {}, refused=f"{share}, less than {MARGIN:.0%}")
        if mode == "soft":
            wanted = sum(n * max((o.nbytes for o in options[kind] if o.saved_us > 0), default=0) for kind, n in counts.items())
            room = max(1, wanted, budget.kv_bytes(0))
            price = CACHE_PRICE * without / room
            sure = {kind: MARGIN * own for kind, (_, _, own) in times.items()}
            options = {k: tuple(o for o in found if o.saved_us - sure[k] >= price * o.nbytes) for k, found in options.items()}
            if wanted and not any(options.values()):
                each = f"beyond {MARGIN:.0%} of its calls each must save {CACHE_PRICE:g} of its share"
                return Plan(mode, budget, {}, {}, refused=f"{share}, for {wanted / room:.0%} of the KV cache: {each}")
            if budget.kv_unknown:
                most = _worth([(n, options[kind], sure[kind]) for kind, n in counts.items()], price, budget.kv_bytes(0))
    return choose([TwinCandidate(name, options[kind]) for name, kind in weights.items()], budget, mode, most)


def _worth(kinds: Sequence[tuple[int, tuple[TwinOption, ...], float]], price: float, cache: int) -> int:
    """Bytes of twins behind which the next one saves less, by the byte, than the cache's bytes cost: `price` microseconds each
    at first, and more by the square of `cache` over what is left of it. kinds: count, options, and what of each saving does
    not count.
    """
    steps = sorted((-saved / nbytes, nbytes, n) for n, options, sure in kinds for nbytes, saved in _steps(options, sure))
    taken = 0
    for slope, nbytes, n in steps:
        for _ in range(n):
            left = cache - taken - nbytes
            if left <= 0 or -slope < price * (cache / left) ** 2:
                return taken
            taken += nbytes
    return taken


def _steps(options: Sequence[TwinOption], sure: float) -> Iterator[tuple[int, float]]:
    """(bytes, microseconds saved) from nothing to the best of some options, the most saved by the byte first."""
    nbytes, saved = 0, sure
    while further := [o for o in options if o.nbytes > nbytes and o.saved_us > saved]:
        to = max(further, key=lambda o: (o.saved_us - saved) / (o.nbytes - nbytes))
        yield to.nbytes - nbytes, to.saved_us - saved
        nbytes, saved = to.nbytes, to.saved_us


def _served(
    counts: Mapping[Kind, int], crossovers: Mapping[Kind, Offer], workload: Workload
) -> dict[Kind, tuple[float, float, float]] | None:
    """Kind -> (microseconds of a weight in those of the workload's calls in which something pays for any kind, the most that is
    saved of them, and those of its own in which something pays for this one); None without times.
    """
    gains = {kind: crossovers[kind].gains(workload) for kind in counts}
    if not all(gains.values()):
        return None
    served = [m for m, _ in workload.calls if any(found[m][1] > 0 for found in gains.values())]
    return {
        kind: (
            math.fsum(found[m][0] for m in served), math.fsum(found[m][1] for m in served),
            math.fsum(without for without, saved in found.values() if saved > 0),
        )
        for kind, found in gains.items()
    }  # fmt: skip


def choose(candidates: Sequence[TwinCandidate], budget: Budget, mode: Mode, most: int | None = None) -> Plan:
    """Choose the options that save the most time, exactly (`knapsack.solve`): at most one a weight, within the budget.

    `off` chooses none. `soft` takes what fits. `hard` gives a twin to every weight that gains from one, or raises BudgetError,
    with the arithmetic, before anything is allocated. Of weights with equal options the earlier get the better one, so that
    equal inputs give equal plans on every rank. most: bytes of twins that are worth theirs, where that is less than fits.
    """
    if mode == "off":
        return Plan(mode, budget, {}, {})
    paying = [(c.name, options) for c in candidates if (options := _paying(c, mode))]
    if mode == "hard":
        wanted = sum(min(o.nbytes for o in options) for _, options in paying)
        if wanted > budget.for_twins:
            raise BudgetError(
                f"mode hard: {len(paying)} twins do not fit\n{budget.arithmetic(wanted)}\n{budget.levers(wanted)}",
                missing=wanted - budget.left,
            )
    shapes: dict[tuple[TwinOption, ...], list[str]] = {}
    for name, options in paying:
        shapes.setdefault(options, []).append(name)
    none = () if mode == "hard" else ((0, 0.0),)
    items = [Item(len(names), (*((o.nbytes, o.saved_us) for o in os), *none)) for os, names in shapes.items()]
    worth = budget.for_twins if most is None else min(most, budget.for_twins)
    solution = solve(items, worth)
    twins: dict[str, TwinOption] = {}
    for (options, names), taken in zip(shapes.items(), solution.taken, strict=True):
        best_first = sorted(range(len(options)), key=lambda o: -options[o].saved_us)
        given = [options[o] for o in best_first for _ in range(taken[o])]
        twins.update(zip(names, given, strict=False))
    chosen = {name: twins[name] for name, _ in paying if name in twins}
    missed = {name: max(options, key=lambda o: o.saved_us) for name, options in paying if name not in twins}
    if worth < budget.for_twins and missed:
        left = sum(o.nbytes for o in missed.values()) / GIB
        counted = ((sum(o.is_twin is kind for o in missed.values()), names) for kind, names in _CALLED.items())
        what = " and ".join(f"{n} more {names[n > 1]}" for n, names in counted if n)
        why = "as much KV cache may be needed: a KV floor says how much is"
        return Plan(mode, budget, chosen, {}, solution.gap, f"{what}, {left:.2f} GiB, are left out, {why}")
    return Plan(mode, budget, chosen, missed, solution.gap)


def _paying(candidate: TwinCandidate, mode: Mode) -> tuple[TwinOption, ...]:
    """The options worth their bytes; in mode `hard` a copy is no twin where there is one."""
    paying = tuple(o for o in candidate.options if o.saved_us > 0)
    twins = tuple(o for o in paying if o.is_twin)
    return twins if mode == "hard" and twins else paying
