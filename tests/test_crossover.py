"""Routes follow the measured times and nothing else; measuring is quick and covers every path."""

import time

import pytest
import torch

from twinweight.crossover import Crossovers, Measured, Shape, measure, without_twin
from twinweight.paths import Path, Route
from twinweight.timing import Timing, interleaved

CPU = torch.device("cpu")


def measured(spread: float = 0.0, **times: list[float]) -> Measured:
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


def test_one_noisy_size_flips_nothing() -> None:
    times = {"int4": [1.0, 1, 9, 1, 2, 4, 8], "twin_bfloat16": [3.0, 3, 3, 3, 3, 3, 3]}
    assert measured(**times).route(["int4", "twin:bfloat16"]) == Route((0, 32), (Path.INT4, Path.TWIN))


def test_a_win_within_the_spread_is_no_win() -> None:
    times = {"int4": [1.0, 1.0, 1.0, 2.0], "twin_bfloat16": [2.0, 2.0, 0.95, 1.0]}
    assert measured(0.0, **times).route(["int4", "twin:bfloat16"]).starts == (0, 4)
    assert measured(0.1, **times).route(["int4", "twin:bfloat16"]).starts == (0, 8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_cpu_shape_is_measured_quickly_and_once(symmetric: bool) -> None:
    shape = Shape(1024, 1024, 128, symmetric, False, torch.bfloat16, CPU)
    crossovers = Crossovers()
    start = time.monotonic()
    first = crossovers.get(shape)
    assert time.monotonic() - start < 10  # far below a second on a quiet machine
    assert set(first.times) == {"int4", "twin:bfloat16", "twin:float32"}
    assert all(t.min > 0 for ts in first.times.values() for t in ts)
    assert crossovers.get(shape) is first


def test_without_twins_one_path_needs_no_measurement() -> None:
    shape = Shape(10**6, 10**6, 128, True, False, torch.bfloat16, CPU)
    assert measure(shape, with_twins=False).route(without_twin(CPU)) == Route.always(Path.INT4)


def test_variants_are_interleaved_and_warmed_up() -> None:
    calls: list[str] = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, device=CPU, repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert timings["a"].min <= timings["a"].median <= timings["a"].max
