import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinweight.errors import BudgetError, ConfigError
from twinweight.plan import Budget, TwinCandidate, TwinOption, check_mode, plan

MIB = 1 << 20


def candidate(name: str, *options: tuple[str, int, float]) -> TwinCandidate:
    return TwinCandidate(name, tuple(TwinOption(d, b, s) for d, b, s in options))


def budget(spendable: int, **more: int) -> Budget:
    total = 10 * spendable + 1000
    return Budget(total, spendable + round(total * 0.1), 0.9, **more)


def test_the_seeds_gate() -> None:
    # free - total x (1 - utilization) = 40 - 100 x 0.1 = 30: three twins of 10 fit, not four.
    b = Budget(total=100, free=40, utilization=0.9)
    result = plan([candidate(str(i), ("bfloat16", 10, 1.0)) for i in range(4)], b, "soft")
    assert list(result.twins) == ["0", "1", "2"]
    assert list(result.missed) == ["3"]
    assert result.missed_bytes == 10


def test_transient_and_floor_are_charged_first() -> None:
    b = Budget(total=100, free=40, utilization=0.9, transient=5, kv_floor=16)
    assert b.for_twins == 9
    assert plan([candidate("a", ("bfloat16", 10, 1.0))], b, "soft").twins == {}


def test_off_plans_nothing() -> None:
    assert plan([candidate("a", ("bfloat16", 1, 1.0))], budget(100), "off").twins == {}


def test_time_saved_per_byte_beats_module_order() -> None:
    weights = [
        candidate("big", ("bfloat16", 60, 6.0)),
        candidate("small", ("bfloat16", 50, 10.0)),
        candidate("tiny", ("bfloat16", 10, 3.0)),
    ]
    assert list(plan(weights, budget(60), "soft").twins) == ["small", "tiny"]


def test_twins_that_do_not_pay_are_left_out() -> None:
    result = plan([candidate("a", ("bfloat16", 1, 0.0), ("float32", 2, -1.0))], budget(100), "hard")
    assert result.twins == result.missed == {}


def test_the_wider_dtype_is_taken_where_it_is_faster_and_fits() -> None:
    options = ("bfloat16", 10, 2.0), ("float32", 20, 3.0)
    assert plan([candidate("a", *options)], budget(20), "soft").twins["a"].dtype == "float32"
    assert plan([candidate("a", *options)], budget(19), "soft").twins["a"].dtype == "bfloat16"


def test_hard_raises_with_the_arithmetic_and_three_levers() -> None:
    b = Budget(total=100 * MIB, free=40 * MIB, kv_floor=20 * MIB)
    with pytest.raises(BudgetError) as caught:
        plan([candidate("a", ("bfloat16", 11 * MIB, 1.0))], b, "hard")
    text = str(caught.value)
    assert caught.value.missing == MIB
    for word in ("free memory", "KV floor", "left for twins", "all twins need", "short", "utilization"):
        assert word in text
    assert text.count("(up to") == 3


@pytest.mark.parametrize("value", ["on", "", "SOFT"])
def test_modes_are_checked(value: str) -> None:
    with pytest.raises(ConfigError, match="off, soft, hard"):
        check_mode(value)


@pytest.mark.parametrize("utilization", [0.0, 1.1, -1.0])
def test_utilization_is_checked(utilization: float) -> None:
    with pytest.raises(ConfigError, match="utilization"):
        Budget(1, 1, utilization)


weights_strategy = st.lists(st.tuples(st.integers(1, 100), st.floats(-1, 10)), max_size=30).map(
    lambda rows: [candidate(str(i), ("bfloat16", b, s), ("float32", 2 * b, 1.5 * s)) for i, (b, s) in enumerate(rows)]
)


@given(weights_strategy, st.integers(0, 2000), st.integers(0, 500), st.integers(0, 100))
def test_soft_never_breaks_budget_or_floor(weights: list[TwinCandidate], spendable: int, floor: int, transient: int) -> None:
    b = budget(spendable, kv_floor=floor, transient=transient)
    result = plan(weights, b, "soft")
    assert result.twin_bytes == 0 or result.twin_bytes + floor + transient <= b.spendable
    assert result == plan(list(weights), dataclasses.replace(b), "soft")
    assert all(o.saved_us > 0 for o in result.twins.values())
