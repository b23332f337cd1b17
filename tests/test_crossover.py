"""Measuring is quick, covers every path, looks closer where one takes over, and is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as File

import pytest
import torch

from twinweight import crossover, search, timing
from twinweight.cache import Cache
from twinweight.crossover import Crossovers, Shape, choices_of, int8_slice, measure
from twinweight.kernels import int8
from twinweight.measured import Measured
from twinweight.paths import Path, Route
from twinweight.search import GRID, Search, load_together, time_variants
from twinweight.timing import Timing, interleaved

CPU = torch.device("cpu")


def shape(n: int = 128, k: int = 128, **more: bool) -> Shape:
    return Shape(n, k, 64, more.get("symmetric", True), more.get("act_order", False), torch.bfloat16, CPU)


@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, True)])
def test_a_cpu_shape_is_measured_quickly_and_once(symmetric: bool, act_order: bool) -> None:
    asked = shape(512, 512, symmetric=symmetric, act_order=act_order)
    crossovers = Crossovers(store=None)
    start = time.monotonic()
    first = crossovers.get(asked)
    assert time.monotonic() - start < 30  # about a second on a quiet machine
    assert set(first.times) == set(choices_of(asked)) >= {"int4", "stream", "twin:bfloat16"}
    assert set(GRID["cpu"]) <= set(first.ms)
    assert all(t.min > 0 for ts in first.times.values() for t in ts)
    assert crossovers.get(asked) is first


def test_mode_off_measures_nothing_where_there_is_one_path() -> None:
    big = shape(10**6, 10**6)
    assert choices_of(big, with_twins=False) == ["int4"]
    assert measure(big, with_twins=False).route(["int4"]) == Route.always(Path.INT4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[int], float]]:
    """Times by choice and rows instead of a clock."""
    laws: dict[str, Callable[[int], float]] = {
        "int4": lambda m: 1e-5 * m,
        "stream": lambda m: 1e-3 + 2e-6 * m,
        "twin:bfloat16": lambda m: 2e-4 + 2e-6 * m,
    }

    def rows(variants: dict[str, object], m: int, *args: object, **more: object) -> dict[str, Timing]:
        return {c: Timing(laws[c](m), laws[c](m), laws[c](m)) for c in variants}

    monkeypatch.setattr(search, "time_rows", rows)
    return laws


def test_takeovers_are_found_between_the_sizes_of_the_grid(clock: dict[str, Callable[[int], float]]) -> None:
    found = time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU)
    # int4 = twin at 200 / 8 = 25 rows, int4 = stream at 125.
    for choices, exact in ((["int4", "twin:bfloat16"], 25), (["int4", "stream"], 125)):
        start = found.route(choices).starts[1]
        assert exact < start <= exact * 1.13  # 2 % late, and as coarse as takeovers are looked for
    assert len(found.ms) <= len(GRID["cpu"]) + 11
    for choices in (["int4", "stream"], ["int4", "stream", "twin:bfloat16"]):
        for m in range(1, 512):
            chosen = next(c for start, c in reversed(found.pieces(choices)) if start <= m)
            assert clock[chosen](m) <= 1.1 * min(clock[c](m) for c in choices)


@pytest.fixture
def timed(clock: object, monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """What is timed at which rows."""
    found: dict[int, set[str]] = {}
    rows = search.time_rows

    def seen(ways: dict[str, object], m: int, *args: object, **more: object) -> dict[str, Timing]:
        found[m] = set(ways)
        return rows(ways, m, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "time_rows", seen)
    return found


def test_a_twin_that_no_plan_takes_is_timed_on_the_grid_alone(
    clock: dict[str, Callable[[int], float]], timed: dict[int, set[str]]
) -> None:
    """fp32, at twice the bytes, is slower than bf16 at every size, and both are within what is timed closely."""
    clock["twin:float32"] = lambda m: 1.5 * clock["twin:bfloat16"](m)
    found = time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU)
    between = set(timed) - set(GRID["cpu"])
    assert len(between) >= 5
    assert {m for m in GRID["cpu"] if "twin:float32" in timed[m]} == {1, 4, 16, 64, 512}  # by which it is known
    assert not any("twin:float32" in timed[m] for m in between)
    assert set(found.times) == set(clock)
    clock["twin:float32"] = lambda m: (0.9 if m == 1 else 1.5) * clock["twin:bfloat16"](m)  # the faster one somewhere
    timed.clear()
    time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU)
    assert any("twin:float32" in timed[m] for m in set(timed) - set(GRID["cpu"]))


def test_on_a_cpu_the_two_paths_of_a_takeover_are_timed_around_it(
    clock: dict[str, Callable[[int], float]], timed: dict[int, set[str]]
) -> None:
    """A twin that takes a tenth of what its weight takes without says nothing of where `stream` takes over from int4."""
    clock["twin:bfloat16"] = lambda m: 1e-4 + 4e-7 * m
    time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU)
    between = [m for m in timed if 128 < m < 256]  # at 128 rows `stream` is 2 % ahead
    assert between
    assert all(timed[m] == {"int4", "stream"} for m in (*between, 128, 256))  # the ends once more
    assert all(timed[m] == {"int4", "twin:bfloat16"} for m in timed if 8 < m < 16)
    assert "stream" not in timed[2] | timed[8]  # far behind int4 at one row and at four


def test_a_call_that_is_disturbed_at_a_size_of_the_grid_moves_no_takeover(
    clock: dict[str, Callable[[int], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at 128 or 256 rows, by which `stream` seemed to take over at 256 or beyond, not at 125."""
    rows, undisturbed = search.time_rows, time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU)
    first = {128, 256}

    def disturbed(ways: dict[str, object], m: int, *args: object, **more: object) -> dict[str, Timing]:
        times = rows(ways, m, *args, **more)  # type: ignore[arg-type]
        if m in first:
            first.remove(m)
            times["stream"] = times["stream"].times(2.0)
        return times

    monkeypatch.setattr(search, "time_rows", disturbed)
    found = time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU)
    assert not first
    start, expected = (of.route(["int4", "stream"]).starts[1] for of in (found, undisturbed))
    assert start == pytest.approx(expected, rel=0.1)


def test_stairs_are_found_where_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes 4 rows at a time loses from the first row of a step on, not from the next even number."""
    stairs = {"int4": lambda m: -(-m // 4) * 4e-5, "twin:bfloat16": lambda m: 2.1e-4 + 1e-7 * m}

    def rows(ways: object, m: int, *args: object, **more: object) -> dict[str, Timing]:
        return {c: Timing(t(m), t(m), t(m)) for c, t in stairs.items()}

    monkeypatch.setattr(search, "time_rows", rows)
    found = time_variants(dict.fromkeys(stairs, lambda x: x), 64, 64, torch.bfloat16, CPU)
    assert found.route(["int4", "twin:bfloat16"]).starts[1] == 21  # 6 steps of 4 rows take longer than the twin, 5 do not


H200 = {
    "fused": {1: 6.77, 8: 6.83, 16: 7.46, 32: 8.24, 64: 10.7, 96: 12.7, 128: 14.5, 170: 17.3, 182: 17.6, 256: 20.2, 384: 23.5,
              512: 27.5, 8192: 383},
    "twin:bfloat16": {1: 12.9, 32: 13.1, 64: 11.9, 108: 12.3, 112: 15.4, 128: 14.0, 159: 15.6, 160: 19.3, 170: 16.4, 256: 17.0,
                      512: 25.4, 8192: 356},
}  # fmt: skip
"""Microseconds up to so many rows: 4096 x 4096 (`tune --check`)."""


def test_jumps_of_a_gpu_are_found_between_the_sizes_of_the_grid(clock: dict[str, Callable[[int], float]]) -> None:
    """At no size of the grid from 64 to 160 is the twin ahead of `fused`, and by a sixth between."""
    clock.clear()
    clock |= {c: lambda m, steps=steps: next(us for most, us in steps.items() if m <= most) * 1e-6 for c, steps in H200.items()}  # type: ignore[misc]
    found = time_variants(dict.fromkeys(clock, lambda x: x), 4096, 4096, torch.bfloat16, torch.device("meta"))
    pieces = found.pieces(found.with_twin("twin:bfloat16"))
    regrets = {}
    for m in range(64, 513):
        chosen = next(c for start, c in reversed(pieces) if start <= m)
        regrets[m] = clock[chosen](m) / min(law(m) for law in clock.values())
    # A jump from one number of rows to the next is known as closely as sizes are.
    assert sum(regret > 1.1 for regret in regrets.values()) <= 16, pieces
    assert max(regrets[m] for m in (64, 76, 91, 108, 128, 152, 181, 215, 256, 304, 362, 431, 512)) <= 1.06
    assert len(found.ms) <= len(GRID["gpu"]) + 16


def test_on_a_gpu_what_is_far_behind_on_both_sides_is_not_timed_between(
    clock: dict[str, Callable[[int], float]], timed: dict[int, set[str]]
) -> None:
    found = time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, torch.device("meta"))
    # int4 is level with the twin at 25 rows and with stream at 125; ends, and what lies between them at first, have all.
    assert "stream" not in timed[8] | timed[16]
    assert "int4" not in timed[640] | timed[2048]
    assert all(len(timed[m]) == 3 for m in (1, 8192))
    assert all(len(times) == len(found.ms) for times in found.times.values())
    assert found.time_at("int4", 640) == pytest.approx(clock["int4"](640), rel=0.01)  # as between its neighbours


def test_at_the_most_rows_what_may_be_the_best_is_timed_under_load(
    clock: dict[str, Callable[[int], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machete and our kernels on an H200, which takes 700 W: the faster one on a rested GPU is the slower one there."""
    clock.clear()
    clock |= {"int4": lambda m: 9e-7 * m, "fused": lambda m: 1e-6 * m, "twin:bfloat16": lambda m: 1e-4 + 1.5e-6 * m}
    loaded = {"int4": 1.3, "fused": 1.1}
    asked: list[tuple[float, list[str]]] = []

    def under_load(
        calls: Mapping[object, Callable[[], object]], *, device: torch.device, seconds: float
    ) -> dict[object, Timing]:
        asked.append((seconds, [str(call()) for call in calls.values()]))
        return {key: loaded_time(str(call())) for key, call in calls.items()}

    def loaded_time(made: str) -> Timing:
        name, rows = made.split("@")
        time = clock[name](int(rows)) * loaded[name]
        return Timing(time, time, time)

    def timed(*weights: str, most: int = 0, load: float = 0.25) -> list[Measured]:
        searches = [
            Search(ways, 64, 64, torch.bfloat16, torch.device("meta"), orders=[("int4", "fused")], most=most) for _ in weights
        ]
        for one in searches:
            one.over_grid()
        if load:
            load_together(searches, load)
        return [one.around_takeovers() for one in searches]

    monkeypatch.setattr(search, "under_load", under_load)
    ways = {c: lambda x, c=c: f"{c}@{len(x)}" for c in clock}  # type: ignore[misc]
    found, other = timed("one", "other")
    assert asked == [(0.25, ["int4@8192", "fused@8192"] * 2)]  # all weights in one go
    assert found.times == other.times
    assert found.time_at("int4", 8192) == pytest.approx(1.3 * clock["int4"](8192))
    assert found.time_at("twin:bfloat16", 8192) == pytest.approx(1.3 * clock["twin:bfloat16"](8192))  # nor does it gain by that
    (_, first), (start, second) = found.pieces(["int4", "fused"])
    assert (first, second) == ("int4", "fused")
    assert 8192 / 1.1 < start <= 8192  # fewer rows are a prompt by itself: a rested GPU's times
    (more,) = timed("one", most=16384)
    assert more.ms[-1] == 16384
    assert more.time_at("int4", 8192) == clock["int4"](8192)
    assert more.time_at("int4", 16384) == pytest.approx(1.3 * clock["int4"](16384))
    (rested,) = timed("one", load=0)
    assert rested.pieces(["int4", "fused"]) == ((0, "int4"),)
    asked.clear()
    clock["fused"] = lambda m: 2e-6 * m
    timed("one", "other")
    assert asked == []  # one path alone may be the best


def test_a_load_is_kept_up_and_the_second_half_of_each_block_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back; what a rested device does first is left out, and a load that grows meanwhile is shared by all."""
    at, made = iter(range(1000)), []
    monkeypatch.setattr(timing, "_time_on_host", lambda call, device: call())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(at)))  # one call a tick of that clock

    def call(name: str, seconds: float) -> float:
        made.append(name)
        return seconds * (1.0 if made[-2:].count(name) < 2 else 2.0)  # the first of a block is faster

    found = timing.under_load({"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}, device=CPU, seconds=8.0)
    assert "".join(made) == "aaaa" + "aaaabbbb" + "bbbbaaaa"
    assert {name: (t.min, t.median, t.max) for name, t in found.items()} == {"a": (2.0, 2.0, 2.0), "b": (6.0, 6.0, 6.0)}


def test_a_kernel_that_takes_seconds_a_size_is_timed_at_few_sizes(clock: dict[str, Callable[[int], float]]) -> None:
    slow = time_variants(dict.fromkeys(clock, lambda x: x), 64, 64, torch.bfloat16, CPU, seconds=0.0)
    assert len(slow.ms) == 5
    assert slow.ms[0] == 1
    assert slow.ms[-1] == GRID["cpu"][-1]
    assert slow.route(["int4", "twin:bfloat16"]).paths == (Path.INT4, Path.TWIN)  # 25 rows, found at the next measured size


def test_kernels_of_all_unknown_shapes_are_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[str, int, int]]] = []

    def compile_together(calls: Iterable[functools.partial[object]]) -> None:
        asked.append([(call.func.__name__, len(call.args[0]), call.args[1].n) for call in calls])

    monkeypatch.setattr(crossover, "compile_together", compile_together)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    known, one, other = (dataclasses.replace(shape(), n=n, device=torch.device("cuda", 0)) for n in (64, 128, 192))
    found = Crossovers({known: Measured((1,), {}, 64)}, store=None)
    found.compile([known, one, other, shape()])
    found.compile([known, shape()])
    assert len(asked) == 1
    assert {(path, n) for path, _, n in asked[0]} == {(path, n) for path in ("int4_linear", "fused_linear") for n in (128, 192)}
    assert [m for path, m, n in asked[0] if (path, n) == ("fused_linear", 128)] == list(reversed(GRID["gpu"]))


def test_the_cache_is_used_and_filled(tmp_path: File, clock: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "variants", lambda shape, n, names: dict.fromkeys(names, lambda x: x))
    monkeypatch.setattr(crossover, "choices_of", lambda shape, **options: ["int4", "stream", "twin:bfloat16"])
    store = Cache(tmp_path)
    first = Crossovers(store=store).get(shape())
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(crossover, "measure", lambda *a, **k: pytest.fail("measured again"))
    again = Crossovers(store=store).get(shape())
    assert again.to_json() == first.to_json()
    with pytest.raises(pytest.fail.Exception):
        Crossovers(store=store).get(shape(symmetric=False))


def test_a_cached_measurement_without_some_path_is_no_answer(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Cache(tmp_path)
    store.write(shape().key, CPU, Measured((1,), {"int4": (Timing(1, 1, 1),), "fused": (Timing(1, 1, 1),)}, 128))
    whole = Measured((1,), {c: (Timing(1, 1, 1),) for c in choices_of(shape())}, 128)
    monkeypatch.setattr(crossover, "measure", lambda *a, **k: whole)
    assert Crossovers(store=store).get(shape()) is whole
    found = store.read(shape().key, CPU)
    assert found is not None
    assert set(found.times) == set(whole.times)


def test_variants_are_interleaved_and_warmed_up() -> None:
    calls: list[str] = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, device=CPU, repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert timings["a"].min <= timings["a"].median <= timings["a"].max


@pytest.mark.parametrize(("enough", "patience", "rounds"), [(7, 60.0, 7), (7, 0.0, 3), (0, 60.0, 3)])
def test_rounds_are_added_until_there_are_enough_or_patience_ends(enough: int, patience: float, rounds: int) -> None:
    calls: list[str] = []
    interleaved({"a": lambda: calls.append("a")}, device=CPU, warmup=2, enough=enough, patience=patience)
    assert len(calls) == 2 + rounds


def test_half_of_many_samples_may_be_disturbed() -> None:
    quiet, busy = Timing.of([1.0, 1.01, 1.02, 1.03] * 3), Timing.of([1.0, 1.01, 1.02, 900.0] * 3)
    assert quiet.spread < 0.02
    assert busy.spread < 0.02
    assert Timing.of([1.0, 1.5, 2.0]).spread == pytest.approx(1 / 6)


@pytest.mark.skipif(not int8.available(), reason="needs a CPU with VNNI or AMX")
def test_8_bit_twins_are_timed_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def rows(ways: dict[str, object], *a: object, **k: object) -> dict[str, Timing]:
        asked.append(list(ways))
        return dict.fromkeys(ways, Timing(1.0, 1.0, 1.0))

    monkeypatch.setattr(search, "time_rows", rows)
    known = Crossovers(store=None)
    assert "twin:int8" not in known.get(shape()).times
    assert "twin:int8" in known.get(shape(), lossy=["int8"]).times
    count = len(asked)
    known.get(shape())
    known.get(shape(), lossy=["int8"])
    assert len(asked) == count  # what was timed with int8 serves those who do not ask for it


@pytest.mark.skipif(not int8.available(), reason="needs a CPU with VNNI or AMX")
def test_a_slice_of_an_int8_twin_rounds_its_share_of_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    data, scales = int8.quantize_weight(torch.randn(64, 128))
    run, quantize, seen = int8_slice(data, scales, 1 / 3), int8.quantize_rows, []
    monkeypatch.setattr(int8, "quantize_rows", lambda x: seen.append(len(x)) or quantize(x))
    for m in (1, 10):
        x = torch.randn(m, 128).bfloat16()
        for _ in range(2):
            y = run(x)
            assert isinstance(y, torch.Tensor)
            assert torch.equal(y, int8.multiply(*quantize(x), data, scales, None, x.dtype))
    assert seen == [1, 1, 1, 10, 4, 4]
