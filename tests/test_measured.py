"""Routes and savings follow from measured times and nothing else."""

from __future__ import annotations

import json
import random
from itertools import combinations_with_replacement, pairwise

import pytest

from twinweight.measured import Costs, Form, Measured, held
from twinweight.paths import Path, Route
from twinweight.timing import Timing
from twinweight.workload import Workload


def measured(spread: float = 0.0, **times: list[float]) -> Measured:
    """At M = 1, 2, 4, ...; the least sample is the time given."""
    ms = tuple(2**i for i in range(len(next(iter(times.values())))))
    rows = {
        name.replace("twin_", "twin:"): tuple(Timing(t * (1 + 2 * spread), t, t * (1 + 4 * spread)) for t in ts)
        for name, ts in times.items()
    }
    return Measured(ms, rows, 64)


ORDER = ["int4", "fused", "twin:bfloat16"]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (
            {"int4": [1, 2, 4, 8], "fused": [3, 3, 3, 6], "twin_bfloat16": [4, 4, 4, 4]},
            Route((0, 4, 8), (Path.INT4, Path.FUSED, Path.TWIN)),
        ),
        ({"int4": [1, 1, 1, 1], "fused": [2, 2, 2, 2], "twin_bfloat16": [4, 4, 4, 4]}, Route((0,), (Path.INT4,))),
        ({"int4": [9, 9, 9, 9], "fused": [8, 8, 8, 8], "twin_bfloat16": [4, 4, 4, 4]}, Route((0,), (Path.TWIN,))),
        ({"int4": [1, 2, 4, 8], "fused": [9, 9, 9, 9], "twin_bfloat16": [2, 2, 2, 2]}, Route((0, 4), (Path.INT4, Path.TWIN))),
    ],
)
def test_the_fastest_path_is_taken(times: dict[str, list[float]], expected: Route) -> None:
    assert measured(**times).route(ORDER) == expected


def test_four_paths_may_follow_each_other() -> None:
    found = measured(
        int4=[1, 2, 4, 8, 16, 32], fused=[3, 3, 3, 6, 12, 24], stream=[8, 8, 8, 8, 9, 16], twin_bfloat16=[7, 7, 7, 7, 7, 8]
    )
    assert found.plain == ("int4", "fused", "stream")
    assert found.route(found.plain) == Route((0, 4, 16), (Path.INT4, Path.FUSED, Path.STREAM))
    assert str(found.route([*found.plain, "twin:bfloat16"])) == "int4 from M=1, fused from M=4, twin from M=16"


def test_a_twin_and_fused_may_take_turns_twice() -> None:
    """As on Hopper, where the one's tiles are filled at other sizes than the other's."""
    found = measured(int4=[9] * 7, fused=[3, 3, 2, 6, 7, 24, 9], twin_bfloat16=[9, 2, 9, 5, 9, 9, 1])
    expected = "fused from M=1, twin from M=2, fused from M=4, twin from M=8, fused from M=16, twin from M=32"
    turns = ("fused", "twin:bfloat16")
    assert found.with_twin("twin:bfloat16") == ("int4", *turns, *turns, *turns)
    assert str(found.route(found.with_twin("twin:bfloat16"))) == expected
    assert measured(int4=[1, 2], twin_bfloat16=[2, 1]).with_twin("twin:bfloat16") == ("int4", "twin:bfloat16")


def test_one_noisy_size_flips_nothing() -> None:
    times = {"int4": [1.0, 1, 9, 1, 2, 4, 8], "twin_bfloat16": [3.0, 3, 3, 3, 3, 3, 3]}
    assert measured(**times).route(["int4", "twin:bfloat16"]) == Route((0, 32), (Path.INT4, Path.TWIN))


def test_a_win_within_the_spread_is_no_win() -> None:
    times = {"int4": [1.0, 1.0, 1.0, 2.0], "twin_bfloat16": [2.0, 2.0, 0.95, 1.0]}
    assert measured(0.0, **times).route(["int4", "twin:bfloat16"]).starts == (0, 4)
    assert measured(0.1, **times).route(["int4", "twin:bfloat16"]).starts == (0, 8)
    assert measured(0.1, int4=[1.0, 1.0], twin_bfloat16=[0.95, 0.95]).route(["int4", "twin:bfloat16"]).starts == (0,)


def test_routes_equal_those_of_a_search_over_all() -> None:
    """The dynamic program against brute force over every way to cut the sizes into segments."""
    r = random.Random(0)
    for _ in range(60):
        found = measured(r.choice([0.0, 0.05]), **{c: [r.uniform(1, 3) for _ in range(5)] for c in ("int4", "fused", "stream")})
        costs, choices = [], ("int4", "fused", "stream")
        for cuts in combinations_with_replacement(range(6), 2):
            edges = (0, *cuts, 5)
            segments = [(c, edges[i], edges[i + 1]) for i, c in enumerate(choices) if edges[i] < edges[i + 1]]
            if all(_beats(found, new, old, at) for (old, _, _), (new, at, _) in pairwise(segments)) and (
                segments[0][0] == "int4" or _beats(found, segments[0][0], "int4", 0)
            ):
                costs.append(_cost(found, [(found.ms[at], c) for c, at, _ in segments]))
        pieces = found.pieces(choices)
        assert _cost(found, [(max(m, 1), c) for m, c in pieces]) == pytest.approx(min(costs))


def _beats(m: Measured, new: str, old: str, at: int) -> bool:
    a, b = m.times[new][at], m.times[old][at]
    return a.min * (1 + max(0.02, a.spread + b.spread)) < b.min


def _cost(m: Measured, pieces: list[tuple[int, str]]) -> float:
    product = 1.0
    for i, rows in enumerate(m.ms):
        choice = [c for start, c in pieces if start <= rows][-1]
        product *= m.times[choice][i].min
    return product


@pytest.mark.parametrize(("m", "expected"), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (6, 4.0), (8, 4.0), (80, 40.0)])
def test_times_are_interpolated_by_powers_and_grow_with_rows_beyond(m: int, expected: float) -> None:
    assert measured(int4=[1.0, 2.0, 4.0, 4.0]).time_at("int4", m) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("route", "least", "expected"),
    [
        ("int4@0 twin@4", 0, "int4@0 twin@4"),
        ("int4@0 twin@4", 6, "int4@0 twin@6"),
        ("int4@0 twin@4", 4, "int4@0 twin@4"),
        ("twin@0", 3, "int4@0 twin@3"),
        ("int4@0", 3, "int4@0"),
        ("int4@0 fused@2 twin@5", 3, "int4@0 fused@3 twin@5"),
        ("int4@0 own@2 fused@3 int4@9", 6, "int4@0 own@2 fused@6 int4@9"),
        ("int4@0 own@2 fused@3 int4@9", 10, "int4@0 own@2 int4@9"),
        ("own@0 twin@4", 6, "own@0 twin@6"),
        ("own@0 fused@3 twin@4", 5, "own@0 twin@5"),
    ],
)
def test_drafted_rows_stay_on_decode_kernels(route: str, least: int, expected: str) -> None:
    def pieces(text: str) -> tuple[tuple[int, str], ...]:
        return tuple((int(start), choice) for choice, _, start in (part.partition("@") for part in text.split()))

    assert held(pieces(route), least, ["int4", "own"]) == pieces(expected)


def test_a_path_may_come_again_under_the_name_that_its_form_gives_it() -> None:
    """As on Hopper: our copy decodes faster, vLLM's kernel is ahead at one size in the middle."""
    found = measured(int4=[4, 4, 4, 8, 9, 40], own=[3, 3, 5, 9, 20, 60], fused=[9, 9, 3, 5, 12, 14], twin_bfloat16=[9] * 6)
    order = {"int4": Path.INNER, "own": Path.INT4, "fused": Path.FUSED}
    form = Form("own", 10, (*order, "int4", "twin:bfloat16"), (*order.values(), Path.INNER, Path.TWIN), is_twin=False)
    offer = Costs(found, Form("none", 0, ("int4",)), (form,), found.n)
    assert str(offer.route(form)) == "int4 from M=1, fused from M=4, inner from M=16, twin from M=32"
    assert offer.options(Workload.of({1: 1, 4: 1}))[0].saved_us == pytest.approx(1e6)
    drafting = Costs(found, offer.base, (form,), found.n, least=6)
    assert str(drafting.route(form)) == "int4 from M=1, fused from M=6, inner from M=16, twin from M=32"


def costs(least: int = 0) -> Costs:
    found = measured(int4=[1e-6, 2e-6, 4e-6, 8e-6], stream=[5e-6, 5e-6, 5e-6, 6e-6], twin_bfloat16=[3e-6] * 4)
    twin = Form("bfloat16", 100, ("int4", "stream", "twin:bfloat16"))
    copy = Form("copy", 10, ("int4", "stream"), is_twin=False)
    return Costs(found, Form("none", 0, ("int4",)), (twin, copy), 128, least)


@pytest.mark.parametrize(
    ("calls", "twin", "copy"),
    [({8: 1}, 10.0, 4.0), ({1: 1}, 0.0, 0.0), ({1: 1, 8: 1}, 5.0, 2.0), ({4: 1, 8: 3}, 8.0, 3.0)],
)
def test_savings_follow_the_workload_and_the_routes(calls: dict[int, float], twin: float, copy: float) -> None:
    """128 output features of which 64 were timed: every time counts twice."""
    found = costs().options(Workload.of(calls))
    assert [(o.name, o.nbytes, o.is_twin) for o in found] == [("bfloat16", 100, True), ("copy", 10, False)]
    assert [o.saved_us for o in found] == pytest.approx([twin, copy])


@pytest.mark.parametrize(("twin", "saves"), [(7.9e-6, False), (7.8e-6, True)])
def test_a_twin_that_saves_less_than_the_margin_is_not_worth_its_memory(twin: float, saves: bool) -> None:
    """It takes over at 4 rows by far; a workload of 8 rows is what it would serve."""
    found = measured(int4=[1e-6, 2e-6, 8e-6, 8e-6], twin_bfloat16=[4e-6, 4e-6, 4e-6, twin])
    form = Form("bfloat16", 100, ("int4", "twin:bfloat16"))
    offer = Costs(found, Form("none", 0, ("int4",)), (form,), found.n)
    assert offer.route(form).at(8) is Path.TWIN
    assert (offer.options(Workload.of({1: 90, 8: 1}))[0].saved_us > 0) is saves
    assert offer.options(Workload.of({1: 90, 4: 1, 8: 1}))[0].saved_us > 0


def test_gains_are_those_of_the_best_form_that_pays() -> None:
    """128 output features of which 64 were timed; below 4 rows nothing takes over, at 8 the copy streams for 12 us."""
    gains = costs().gains(Workload.of({1: 1, 8: 1}))
    assert {m: pytest.approx(pair) for m, pair in {1: (1.0, 0.0), 8: (8.0, 5.0)}.items()} == gains
    assert costs(least=16).gains(Workload.prefill(8)) == {8: pytest.approx((16.0, 0.0))}


def test_a_twin_saves_nothing_below_the_rows_it_serves() -> None:
    assert costs(least=8).options(Workload.prefill(4))[0].saved_us == 0
    assert costs(least=8).options(Workload.prefill(8))[0].saved_us == pytest.approx(10.0)


def test_json_and_back() -> None:
    found = measured(0.1, int4=[1, 2, 4], twin_bfloat16=[3, 3, 3])
    back = Measured.from_json(json.loads(json.dumps(found.to_json())))
    assert back.route(ORDER[::2]) == found.route(ORDER[::2])
    assert (back.ms, back.n) == (found.ms, found.n)
    assert [t.spread for t in back.times["int4"]] == [t.spread for t in found.times["int4"]]


@pytest.mark.parametrize(
    "damage",
    [
        {"ms": []},
        {"ms": [1, 1, 2]},
        {"ms": [1, 2]},
        {"ms": [0, 1, 2]},
        {"n": None},
        {"times": {}},
        {"times": {"int4": [[1, 1, 1]]}},
        {"times": {"int4": [[1, 1]] * 3}},
        {"times": {"int4": [[1, float("nan"), 1, 0]] * 3}},
    ],
)
def test_damaged_times_are_refused(damage: dict[str, object]) -> None:
    good = measured(int4=[1, 2, 4]).to_json()
    with pytest.raises((ValueError, TypeError, KeyError)):
        Measured.from_json(good | damage)
