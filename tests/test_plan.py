import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinweight import twins
from twinweight.crossover import Crossovers, Shape
from twinweight.errors import BudgetError, ConfigError
from twinweight.plan import Budget, Mode, TwinCandidate, TwinOption, check_mode, choose, plan
from twinweight.workload import Workload

MIB = 1 << 20


def candidate(name: str, *options: tuple[str, int, float]) -> TwinCandidate:
    return TwinCandidate(name, tuple(TwinOption(d, b, s) for d, b, s in options))


def budget(spendable: int, **more: int) -> Budget:
    total = 10 * spendable + 1000
    return Budget(total, spendable + round(total * 0.1), 0.9, **more)


def test_the_gate_on_free_memory() -> None:
    # free - total x (1 - utilization) = 40 - 100 x 0.1 = 30: three twins of 10 fit, not four.
    b = Budget(total=100, free=40, utilization=0.9)
    result = choose([candidate(str(i), ("bfloat16", 10, 1.0)) for i in range(4)], b, "soft")
    assert list(result.twins) == ["0", "1", "2"]
    assert list(result.missed) == ["3"]
    assert result.missed_bytes == 10


def test_transient_and_floor_are_charged_first() -> None:
    b = Budget(total=100, free=40, utilization=0.9, transient=5, kv_floor=16)
    assert b.for_twins == 9
    assert choose([candidate("a", ("bfloat16", 10, 1.0))], b, "soft").twins == {}


def test_off_plans_nothing() -> None:
    assert choose([candidate("a", ("bfloat16", 1, 1.0))], budget(100), "off").twins == {}


def test_time_saved_per_byte_beats_module_order() -> None:
    weights = [
        candidate("big", ("bfloat16", 60, 6.0)),
        candidate("small", ("bfloat16", 50, 10.0)),
        candidate("tiny", ("bfloat16", 10, 3.0)),
    ]
    assert list(choose(weights, budget(60), "soft").twins) == ["small", "tiny"]


def test_twins_that_do_not_pay_are_left_out() -> None:
    result = choose([candidate("a", ("bfloat16", 1, 0.0), ("float32", 2, -1.0))], budget(100), "hard")
    assert result.twins == result.missed == {}


def test_the_wider_dtype_is_taken_where_it_is_faster_and_fits() -> None:
    options = ("bfloat16", 10, 2.0), ("float32", 20, 3.0)
    assert choose([candidate("a", *options)], budget(20), "soft").twins["a"].dtype == "float32"
    assert choose([candidate("a", *options)], budget(19), "soft").twins["a"].dtype == "bfloat16"


def test_hard_raises_with_the_arithmetic_and_three_levers() -> None:
    b = Budget(total=100 * MIB, free=40 * MIB, kv_floor=20 * MIB)
    with pytest.raises(BudgetError) as caught:
        choose([candidate("a", ("bfloat16", 11 * MIB, 1.0))], b, "hard")
    text = str(caught.value)
    assert caught.value.missing == MIB
    for word in ("free memory", "KV floor", "left for twins", "all twins need", "short", "utilization"):
        assert word in text
    assert text.count("(up to") == 3


def test_what_is_short_counts_what_the_rest_lacks_too() -> None:
    """1 GiB is free and 3 are kept: a twin of 2 GiB lacks 4, and settings that hold nothing would free nothing."""
    b = Budget(total=1 << 30, free=1 << 30, utilization=1.0, kv_floor=3 << 30)
    with pytest.raises(BudgetError) as caught:
        choose([candidate("a", ("bfloat16", 2 << 30, 1.0))], b, "hard")
    assert caught.value.missing == 4 << 30
    text = str(caught.value)
    assert "4.000 GiB short; lower the KV floor (up to 3.00 GiB); use mode soft or off (up to 2.00 GiB)" in text
    assert "0.00 GiB" not in text.split("short")[1]
    assert "left for twins -2.000 GiB" in " ".join(text.split())
    assert b.for_twins == 0
    assert Budget(1, 1, 1.0, kv_floor=2).levers(0) == "0.000 GiB short"


@pytest.mark.parametrize("value", ["on", "", "SOFT"])
def test_modes_are_checked(value: str) -> None:
    with pytest.raises(ConfigError, match="off, soft, hard"):
        check_mode(value)


@pytest.mark.parametrize("utilization", [0.0, 1.1, -1.0])
def test_utilization_is_checked(utilization: float) -> None:
    with pytest.raises(ConfigError, match="utilization"):
        Budget(1, 1, utilization)


def test_hard_takes_the_smaller_dtype_where_the_wider_does_not_fit() -> None:
    options = ("bfloat16", 10, 2.0), ("float32", 20, 3.0)
    weights = [candidate(name, *options) for name in "abc"]
    assert [o.dtype for o in choose(weights, budget(60), "hard").twins.values()] == ["float32"] * 3
    assert [o.dtype for o in choose(weights, budget(50), "hard").twins.values()] == ["float32", "float32", "bfloat16"]
    with pytest.raises(BudgetError) as caught:
        choose(weights, budget(29), "hard")
    assert caught.value.missing == 1


def test_a_copy_that_is_no_twin_competes_in_soft_and_is_none_in_hard() -> None:
    both = (TwinOption("bfloat16", 40, 3.0), TwinOption("canonical", 10, 2.0, is_twin=False))
    weights = [TwinCandidate(name, both) for name in "ab"]
    assert [o.name for o in choose(weights, budget(50), "soft").twins.values()] == ["bfloat16", "canonical"]
    assert [o.name for o in choose(weights, budget(20), "soft").twins.values()] == ["canonical", "canonical"]
    assert [o.name for o in choose(weights, budget(80), "hard").twins.values()] == ["bfloat16", "bfloat16"]
    with pytest.raises(BudgetError):
        choose(weights, budget(50), "hard")


class Linear:
    """An offer of one twin that saves a microsecond a row."""

    def options(self, workload: Workload) -> tuple[TwinOption, ...]:
        return (TwinOption("bfloat16", 10, sum(m * share for m, share in workload.calls) - 64),)

    def gains(self, workload: Workload) -> dict[int, tuple[float, float]]:
        return {}


def test_the_workload_decides_whether_a_twin_pays() -> None:
    weights = {"a": "kind", "b": "kind"}
    for rows, count in ((2048, 2), (32, 0)):
        found = plan(weights, budget(100), {"kind": Linear()}, Workload.prefill(rows), "soft")
        assert len(found.twins) == count
    assert plan(weights, budget(100), {}, Workload.prefill(), "off").twins == {}


def test_an_int4_head_gets_no_twin_in_the_embedded_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt it multiplies the last row."""
    shape = Shape(64, 64, 64, True, False, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(twins, "costs_of", lambda *_: Linear())
    shapes = {"model.layers.0.mlp.down_proj": shape, "lm_head": shape, "language_model.lm_head": shape}
    for mode in ("soft", "hard"):
        found = twins.decide(shapes, budget(100), mode, Crossovers(store=None))
        assert list(found.twins) == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("mode", ["off", "soft", "hard"])
def test_where_no_weight_is_int4_nothing_is_planned(mode: Mode) -> None:
    found = plan({}, budget(100), {}, Workload.prefill(), mode)
    assert (found.twins, found.missed, found.refused) == ({}, {}, "")


@dataclasses.dataclass(frozen=True)
class Timed:
    """An offer of a twin that saves `saved` of the `without` microseconds of calls of 64 rows or more."""

    without: float
    saved: float

    def options(self, workload: Workload) -> tuple[TwinOption, ...]:
        return (TwinOption("bfloat16", 10, math.fsum(share * self.saved for m, share in workload.calls if m >= 64)),)

    def gains(self, workload: Workload) -> dict[int, tuple[float, float]]:
        return {m: (share * self.without, share * self.saved if m >= 64 else 0.0) for m, share in workload.calls}


@pytest.mark.parametrize(("large", "twins"), [(101.0, 0), (99.0, 2)])
def test_twins_that_together_save_too_little_are_not_built(large: float, twins: int) -> None:
    """Two layers save 3 of 100 microseconds each; a large one gains nothing, and the more it takes the less that is."""
    offers = {"small": Timed(100.0, 3.0), "large": Timed(large, 0.0)}
    weights = {"a": "small", "b": "large", "c": "small"}
    for workload in (Workload.prefill(2048), Workload.of({1: 90, 2048: 10})):  # decode, which no twin serves, does not count
        found = plan(weights, budget(1000), offers, workload, "soft")
        assert len(found.twins) == twins
        assert found.refused == (
            "" if twins else "twins would save 2.0% of the linear layers' time in the calls they serve, less than 2%"
        )


@pytest.mark.parametrize(("spendable", "twins"), [(230, 0), (250, 1), (510, 2)])
def test_soft_pays_for_the_cache_that_twins_take(spendable: int, twins: int) -> None:
    """A twin of 10 bytes must save 2.61, 2.4 or 1.18 of 300 microseconds beyond 2 of its own 100: they save 1.2 and 2.5 so."""
    offers = {"little": Timed(100.0, 3.2), "more": Timed(100.0, 4.5), "large": Timed(100.0, 0.0)}
    weights = {"a": "little", "b": "more", "c": "large"}
    found = plan(weights, budget(spendable), offers, Workload.prefill(2048), "soft")
    assert (list(found.twins), found.missed) == ({0: [], 1: ["b"], 2: ["a", "b"]}[twins], {})
    assert ("save 2.6%" in found.refused and "for 9% of the KV cache" in found.refused) == (twins == 0)
    assert len(plan(weights, budget(spendable), offers, Workload.prefill(2048), "hard").twins) == 2


def test_only_calls_that_a_twin_serves_count_against_it() -> None:
    """Nine of ten calls are decode, which no twin serves: 2 % of the tenth do not count, not 2 % of all."""
    mixed = Workload.of({1: 90, 2048: 10})
    found = plan({"a": "only"}, budget(400), {"only": Timed(100.0, 5.0)}, mixed, "soft")
    assert list(found.twins) == ["a"]


def test_where_memory_is_short_twins_that_save_much_are_built() -> None:
    """Four twins of 10 bytes, room for one: each saves an eighth of the time, and would take all of the cache."""
    offers = {"much": Timed(100.0, 50.0), "little": Timed(100.0, 19.0)}
    for kind, count in (("much", 1), ("little", 0)):
        found = plan(dict.fromkeys("abcd", kind), budget(10), offers, Workload.prefill(2048), "soft")
        assert (len(found.twins), len(found.missed)) == (count, 3 * count)


def test_twins_leave_some_cache_where_nobody_says_how_much_is_needed() -> None:
    """Ten twins of 10 bytes, 100 of a cache of 120, save 48 of 100 microseconds each beyond the margin, 4.8 by the byte. A byte
    costs a fifth of 1000 microseconds by 120 at first, 3.75 times of 80 bytes left and 4.9 of 70.
    """
    offers, weights = {"much": Timed(100.0, 50.0)}, dict.fromkeys("abcdefghij", "much")
    known, unknown = budget(120), budget(120, kv_unknown=True)
    assert len(plan(weights, known, offers, Workload.prefill(2048), "soft").twins) == 10
    found = plan(weights, unknown, offers, Workload.prefill(2048), "soft")
    assert (list(found.twins), found.missed) == (list("abcd"), {})
    assert "6 more twins" in found.refused
    assert "KV floor" in found.refused
    assert len(plan(weights, unknown, offers, Workload.prefill(2048), "hard").twins) == 10
    plenty = plan(weights, budget(10**4, kv_unknown=True), offers, Workload.prefill(2048), "soft")
    assert (len(plenty.twins), plenty.refused) == (10, "")
    tight = plan(weights, budget(120, kv_floor=95, kv_unknown=True), offers, Workload.prefill(2048), "soft")
    assert (len(tight.twins), len(tight.missed), tight.refused) == (2, 8, "")  # the floor alone decides


def test_of_several_options_each_further_byte_must_be_worth_it() -> None:
    """A copy of 2 bytes saves 40 microseconds, 10 more bytes 10 more: worth it where the cache is large."""

    class Both(Timed):
        def options(self, workload: Workload) -> tuple[TwinOption, ...]:
            return (TwinOption("canonical", 2, 40.0, is_twin=False), TwinOption("bfloat16", 12, 50.0))

    for cache, names in ((2000, ["bfloat16"] * 4), (90, ["canonical"] * 4)):
        found = plan(dict.fromkeys("abcd", "kind"), budget(cache, kv_unknown=True), {"kind": Both(100.0, 50.0)},
                     Workload.prefill(2048), "soft")  # fmt: skip
        assert [o.name for o in found.twins.values()] == names


times = st.tuples(st.floats(1, 100), st.floats(0, 1))


@given(st.lists(times, min_size=1, max_size=8), st.integers(0, 200), st.integers(0, 100), st.booleans())
def test_more_budget_is_never_slower_by_the_price_of_the_cache(
    kinds: list[tuple[float, float]], spendable: int, more: int, unknown: bool
) -> None:
    offers = {str(i): Timed(without, without * share) for i, (without, share) in enumerate(kinds)}
    small, large = (
        plan({k: k for k in offers}, budget(n, kv_unknown=unknown), offers, Workload.prefill(2048), "soft")
        for n in (spendable, spendable + more)
    )
    assert large.saved_us >= small.saved_us - 1e-6
    known = plan({k: k for k in offers}, budget(spendable), offers, Workload.prefill(2048), "soft")
    assert small.twin_bytes <= known.twin_bytes
    assert not unknown or small.twin_bytes <= max(0, spendable - 1)


weights_strategy = st.lists(st.tuples(st.integers(1, 100), st.floats(-1, 10).map(lambda s: round(s, 6))), max_size=30).map(
    lambda rows: [candidate(str(i), ("bfloat16", b, s), ("float32", 2 * b, 1.5 * s)) for i, (b, s) in enumerate(rows)]
)


@given(weights_strategy, st.integers(0, 2000), st.integers(0, 500), st.integers(0, 100))
def test_soft_never_breaks_budget_or_floor(weights: list[TwinCandidate], spendable: int, floor: int, transient: int) -> None:
    b = budget(spendable, kv_floor=floor, transient=transient)
    result = choose(weights, b, "soft")
    assert result.twin_bytes == 0 or result.twin_bytes + floor + transient <= b.spendable
    assert result == choose(list(weights), dataclasses.replace(b), "soft")
    assert all(o.saved_us > 0 for o in result.twins.values())


def module_order(weights: list[TwinCandidate], room: int) -> float:
    """What a plan in module order saves: each weight takes its fastest option as long as it fits."""
    saved = 0.0
    for c in weights:
        fastest = max(c.options, key=lambda o: o.saved_us)
        if 0 < fastest.saved_us and fastest.nbytes <= room:
            room -= fastest.nbytes
            saved += fastest.saved_us
    return saved


@given(weights_strategy, st.integers(0, 2000), st.integers(0, 500))
def test_more_budget_is_never_slower_and_module_order_never_better(
    weights: list[TwinCandidate], spendable: int, more: int
) -> None:
    small, large = (choose(weights, budget(n), "soft") for n in (spendable, spendable + more))
    assert small.gap == large.gap == 0
    # Savings count in units of 2^-30 of the largest.
    assert large.saved_us >= small.saved_us - 1e-6
    assert small.saved_us >= module_order(weights, small.budget.for_twins) - 1e-6
    assert choose(weights, budget(spendable), "off").saved_us == 0


@given(weights_strategy, st.integers(0, 2000))
def test_hard_gives_a_twin_to_all_that_pay_or_raises(weights: list[TwinCandidate], spendable: int) -> None:
    paying = [c.name for c in weights if any(o.saved_us > 0 for o in c.options)]
    least = sum(min(o.nbytes for o in c.options if o.saved_us > 0) for c in weights if c.name in paying)
    b = budget(spendable)
    if least > b.for_twins:
        with pytest.raises(BudgetError) as caught:
            choose(weights, b, "hard")
        assert caught.value.missing == least - b.left
    else:
        found = choose(weights, b, "hard")
        assert list(found.twins) == paying
        assert found.missed == {}
        assert found.twin_bytes <= b.for_twins


def test_equal_weights_go_in_module_order() -> None:
    weights = [candidate(str(i), ("bfloat16", 10, 1.0), ("float32", 20, 1.5)) for i in range(6)]
    found = choose(weights, budget(45), "soft")
    assert list(found.twins) == ["0", "1", "2", "3"]
    assert list(found.missed) == ["4", "5"]


def test_calls_in_which_nothing_pays_are_told() -> None:
    offers, decode = {"only": Timed(100.0, 5.0)}, Workload.of({1: 1.0})
    for mode in ("soft", "hard"):
        found = plan({"a": "only"}, budget(400), offers, decode, mode)  # type: ignore[arg-type]
        assert (found.twins, found.missed, found.refused) == ({}, {}, "no twin saves time in calls of these sizes")
    assert plan({"a": "only"}, budget(400), offers, decode, "off").refused == ""


def test_copies_that_are_left_out_are_not_called_twins() -> None:
    options = tuple(TwinOption(name, nbytes, us, is_twin) for name, nbytes, us, is_twin in (("t", 40, 9.0, True),))
    copy = (TwinOption("copy", 10, 5.0, False),)
    found = choose([TwinCandidate("a", options), TwinCandidate("b", copy)], budget(400), "soft", most=5)
    assert found.refused.startswith("1 more twin and 1 more int4 copy, ")
