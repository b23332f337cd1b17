import pytest

from twinweight import paths
from twinweight.paths import Path, Route

ROUTE = Route((0, 5, 64), (Path.INT4, Path.FUSED, Path.TWIN))


@pytest.mark.parametrize(
    ("m", "path"),
    [(0, Path.INT4), (1, Path.INT4), (4, Path.INT4), (5, Path.FUSED), (63, Path.FUSED), (64, Path.TWIN), (10**6, Path.TWIN)],
)
def test_route_and_its_flat_form_agree(m: int, path: Path) -> None:
    assert ROUTE.at(m) == path
    assert paths.pick(ROUTE.flat(), m) == path


def test_crossover_is_the_start_of_a_path() -> None:
    assert ROUTE.start_of(Path.TWIN) == 64
    assert ROUTE.start_of(Path.STREAM) is None
    assert Route.always(Path.TWIN).start_of(Path.TWIN) == 0


@pytest.mark.parametrize(
    ("starts", "taken"), [((), ()), ((1,), (Path.INT4,)), ((0, 0), (Path.INT4, Path.TWIN)), ((0, 5), (Path.INT4,))]
)
def test_bad_routes_are_refused(starts: tuple[int, ...], taken: tuple[Path, ...]) -> None:
    with pytest.raises(ValueError, match="route"):
        Route(starts, taken)


def test_calls_are_counted_by_path_and_power_of_two() -> None:
    paths.calls.clear()
    for m in (0, 1, 5, 7, 8):
        assert paths.take(ROUTE.flat(), m) == ROUTE.at(m)
    assert dict(paths.calls) == {(Path.INT4, 0): 1, (Path.INT4, 1): 1, (Path.FUSED, 4): 2, (Path.FUSED, 8): 1}
