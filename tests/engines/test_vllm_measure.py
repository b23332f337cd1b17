"""What a layer in vLLM could have, and what is made of the times. Needs no vLLM, and no GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from twinweight.crossover import grid
from twinweight.engines.vllm import measure
from twinweight.measured import Measured
from twinweight.timing import Timing
from twinweight.workload import Workload

N, K = 256, 512


def layer(device: str) -> Any:
    """A 4-bit layer on a device."""
    config = SimpleNamespace(
        weight_type=SimpleNamespace(size_bits=4), zero_points=False, has_g_idx=False, group_size=128, act_type=torch.bfloat16
    )
    return SimpleNamespace(n=N, k=K, device=torch.device(device), config=config, dtype=torch.bfloat16, inner=object())


def measured(**times: list[float]) -> Measured:
    """At 1, 32, 256, 512 and 1024 rows, in microseconds."""
    rows = {c.replace("twin_", "twin:"): tuple(Timing(t / 1e6, t / 1e6, t / 1e6) for t in ts) for c, ts in times.items()}
    return Measured((1, 32, 256, 512, 1024), rows, N)


def machete() -> Measured:
    return measured(
        int4=[30, 30, 100, 180, 350], own=[20, 28, 200, 400, 800], fused=[25, 28, 80, 200, 360],
        stream=[150, 150, 180, 240, 420], twin_bfloat16=[60, 60, 100, 170, 340],
    )  # fmt: skip


def test_a_layer_on_a_gpu_may_have_a_twin_a_copy_or_both() -> None:
    twin, copy, both = measure.forms_of(layer("cuda"), [])
    assert (twin.name, copy.name, both.name) == ("bfloat16", "own", "own+bfloat16")
    assert copy.nbytes == N * K // 2 + N * K // 128 * 2
    assert twin.nbytes + copy.nbytes == both.nbytes
    assert (twin.is_twin, copy.is_twin, both.is_twin) == (True, False, True)


def test_our_kernels_count_as_slower_in_a_server_than_alone_where_it_decodes() -> None:
    alone, expected = machete(), measure.in_a_server(machete())
    for choice, factors in {"own": (1.1, 1.2, 1.2, 1, 1), "fused": (1.1, 1.2, 1.2, 1, 1), "int4": (1,) * 5}.items():
        ratios = [b.min / a.min for a, b in zip(alone.times[choice], expected.times[choice], strict=True)]
        assert ratios == pytest.approx(factors), choice


def test_paths_of_a_copy_and_of_vllm_take_turns() -> None:
    offer = measure.offer(layer("cuda"), machete(), None, 0)
    assert [str(offer.route(form)) for form in (None, *offer.forms)] == [
        "int4 from M=1",
        "int4 from M=1, twin from M=512",
        "int4 from M=1, inner from M=32, fused from M=256, inner from M=512",
        "int4 from M=1, inner from M=32, fused from M=256, twin from M=512",
    ]
    saved = {o.name: o.saved_us for o in offer.options(Workload.of({1: 1, 256: 1, 512: 2}))}
    assert saved == pytest.approx({"bfloat16": 2 * 10 / 4, "own": (8 + 4) / 4, "own+bfloat16": (8 + 4 + 2 * 10) / 4})


def test_a_drafting_server_decodes_by_decode_kernels() -> None:
    found = measured(int4=[30] * 5, own=[20] * 5, fused=[10] * 5, stream=[99] * 5, twin_bfloat16=[99] * 5)
    offer = measure.offer(layer("cuda"), found, None, least=6)
    assert str(offer.route(offer.forms[1])) == "inner from M=1, fused from M=6"


def test_what_was_not_timed_is_not_offered() -> None:
    found = measured(int4=[30] * 5, stream=[20] * 5, twin_bfloat16=[10] * 5)
    assert [form.name for form in measure.offer(layer("cuda"), found, None, 0).forms] == ["bfloat16"]


def test_a_kernel_that_does_not_compile_takes_no_other_along(caplog: pytest.LogCaptureFixture) -> None:
    rows: list[int] = []

    def broken(x: Tensor) -> object:
        raise NotImplementedError("no such instruction")

    calls = {"fused": broken, "stream": lambda x: rows.append(len(x))}
    with caplog.at_level(logging.WARNING, "vllm.twinweight"):
        assert list(measure._ready(calls, layer("meta"))) == ["stream"]
    assert set(rows) == set(grid(torch.device("meta")))
    assert "does without fused" in caplog.text
    assert "no such instruction" in caplog.text
