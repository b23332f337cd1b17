"""`plan`: which weights get a twin. A pure function of sizes, measured times and a budget; it touches no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from twinweight.errors import BudgetError, ConfigError

Mode = Literal["off", "soft", "hard"]
GIB = 1 << 30
SEED_SWITCH = "VLLM_W4A16_PREFILL_BF16"
"""The environment variable this project started from: 1 means mode `soft`."""


def check_mode(value: str) -> Mode:
    """`value` as a `Mode`; raises ConfigError naming the modes."""
    for mode in get_args(Mode):
        if value == mode:
            return mode  # type: ignore[no-any-return]
    raise ConfigError(f"mode is {value!r}, expected one of {', '.join(get_args(Mode))}")


@dataclass(frozen=True)
class TwinOption:
    """A twin that a weight could have.

    dtype: its name ("bfloat16"). nbytes: padding included. saved_us: microseconds it saves in a prefill-sized call, against
    the best path without a twin; at most 0 where it does not pay.
    """

    dtype: str
    nbytes: int
    saved_us: float


@dataclass(frozen=True)
class TwinCandidate:
    """One weight and its options (several dtypes)."""

    name: str
    options: tuple[TwinOption, ...]


@dataclass(frozen=True)
class Budget:
    """Bytes, read once, from which everything else is computed.

    total, free: of the device, `free` when the int4 weights are in place. utilization: share of `total` that may be used at
    all.
    transient: peak of temporaries while a twin is built. kv_floor: KV cache that twins may never take.
    reserves: what else must stay free, by name (activations, CUDA graphs).
    """

    total: int
    free: int
    utilization: float = 0.9
    transient: int = 0
    kv_floor: int = 0
    reserves: tuple[tuple[str, int], ...] = ()

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
    def for_twins(self) -> int:
        """What twins may use: the spendable bytes less the KV floor, the reserves and the transient of building one."""
        return max(0, self.spendable - self.kv_floor - self.transient - sum(n for _, n in self.reserves))

    def arithmetic(self, wanted: int) -> str:
        """The sum that decides, line by line, with the bytes that all twins would need."""
        rows = [
            ("free memory", self.free),
            (f"kept free: total {self.total / GIB:.2f} GiB x (1 - utilization {self.utilization:g})", -self.untouchable),
            ("KV floor", -self.kv_floor),
            *((f"reserve for {name}", -nbytes) for name, nbytes in self.reserves),
            ("peak of building a twin", -self.transient),
            ("left for twins", self.for_twins),
            ("all twins need", wanted),
        ]
        return "\n".join(f"  {label:<58}{nbytes / GIB:>10.3f} GiB" for label, nbytes in rows)

    def levers(self, wanted: int) -> str:
        """The three settings that would make room, biggest first."""
        short = wanted - self.for_twins
        options = [
            (self.untouchable, "raise utilization"),
            (self.kv_floor, "lower the KV floor"),
            (wanted, "use mode soft or off"),
            *((nbytes, f"lower the reserve for {name}") for name, nbytes in self.reserves),
        ]
        options.append((max(0, self.total - self.free - self.untouchable), "free memory that other processes or models hold"))
        ranked = sorted(options, reverse=True)[:3]
        return f"{short / GIB:.3f} GiB short; " + "; ".join(f"{what} (up to {n / GIB:.2f} GiB)" for n, what in ranked)


@dataclass(frozen=True)
class Plan:
    """What was decided. twins: weight name -> its option; missed: weights whose twin pays but does not fit."""

    mode: Mode
    budget: Budget
    twins: dict[str, TwinOption]
    missed: dict[str, TwinOption]

    @property
    def twin_bytes(self) -> int:
        """Bytes of all planned twins."""
        return sum(o.nbytes for o in self.twins.values())

    @property
    def missed_bytes(self) -> int:
        """Bytes that the missed twins would need."""
        return sum(o.nbytes for o in self.missed.values())


def plan(candidates: Sequence[TwinCandidate], budget: Budget, mode: Mode) -> Plan:
    """Choose twins by time saved per byte until the budget is spent.

    `off` chooses none. `soft` takes what fits. `hard` takes all that pay, or raises BudgetError, with the arithmetic, before
    anything is allocated. Ties go to the earlier candidate, so that equal inputs give equal plans on every rank.
    """
    if mode == "off":
        return Plan(mode, budget, {}, {})
    best = {c.name: max(c.options, key=lambda o: o.saved_us) for c in candidates if any(o.saved_us > 0 for o in c.options)}
    wanted = sum(o.nbytes for o in best.values())
    if mode == "hard":
        if wanted > budget.for_twins:
            raise BudgetError(
                f"mode hard: {len(best)} twins do not fit\n{budget.arithmetic(wanted)}\n{budget.levers(wanted)}",
                missing=wanted - budget.for_twins,
            )
        return Plan(mode, budget, best, {})
    twins: dict[str, TwinOption] = {}
    left = budget.for_twins
    pairs = [(c.name, o) for c in candidates for o in c.options if o.saved_us > 0]
    for name, option in sorted(pairs, key=lambda p: -p[1].saved_us / p[1].nbytes):
        upgrade = option.nbytes - (twins[name].nbytes if name in twins else 0)
        better = name not in twins or option.saved_us > twins[name].saved_us
        if better and upgrade <= left:
            twins[name] = option
            left -= upgrade
    order = {c.name: i for i, c in enumerate(candidates)}
    chosen = dict(sorted(twins.items(), key=lambda p: order[p[0]]))
    return Plan(mode, budget, chosen, {n: o for n, o in best.items() if n not in twins})
