"""On a GPU: graphs captured with a twin follow a reload, because everything is written in place."""

import pytest
import torch

from tests.helpers import random_weight
from twinweight.crossover import Shape, by_graphs
from twinweight.linear import Int4Linear
from twinweight.paths import Path, Route

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("m", [1, 8, 64])
def test_a_captured_graph_follows_a_reload(m: int) -> None:
    linear = Int4Linear(random_weight(256, 256, 64).to("cuda"))
    linear.build_twin(torch.bfloat16)
    linear.route_with_twin = Route((0, 4, 32), (Path.INT4, Path.FUSED, Path.TWIN))
    x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        linear(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x)
        graph.replay()
        assert torch.equal(out, linear(x))
        stale = out.clone()
        linear.set_weight(random_weight(256, 256, 64, seed=1).to("cuda"))
        graph.replay()
        assert torch.equal(out, linear(x))
        assert not torch.equal(out, stale)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(out, linear(x))


def test_short_calls_are_timed_as_graphs_and_long_ones_as_they_are() -> None:
    def run() -> None:
        torch.ones(1, device="cuda")

    wraps = by_graphs(Shape(4096, 4096, 128, True, False, torch.bfloat16, torch.device("cuda", 0)))
    short = wraps(1024)
    assert short is not None
    assert short(run) is not run
    assert wraps(1025) is None


def test_reduce_overhead_compiles_to_graphs_that_equal_eager() -> None:
    linear = Int4Linear(random_weight(256, 256, 64).to("cuda"))
    linear.build_twin(torch.bfloat16)
    linear.route_with_twin = Route((0, 32), (Path.INT4, Path.TWIN))
    compiled = torch.compile(linear, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for m in (64, 1, 64, 1):
            x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
            for _ in range(3):
                assert torch.equal(compiled(x), linear(x))
