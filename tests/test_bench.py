"""How often `bench` repeats its arms."""

from __future__ import annotations

from pathlib import Path

import pytest

import twinweight
from tests.engines.test_hf import Fixed
from tests.test_synth import tiny
from twinweight import synth
from twinweight.bench import Workload, bench


@pytest.mark.parametrize(("repeats", "seconds", "done"), [(2, 0.0, 2), (5, 0.0, 3), (5, 1e9, 5)])
def test_repeats_end_when_time_is_up_but_not_before_three(tmp_path: Path, repeats: int, seconds: float, done: int) -> None:
    synth.write(tiny("qwen3-0.6b"), tmp_path, group_size=32)
    model = twinweight.load(tmp_path, crossovers=Fixed(), progress=False, device="cpu")
    steps: list[str] = []
    result = bench(model, Workload(8, 2), repeats=repeats, seconds=seconds, step=steps.append)
    assert result["workload"]["repeats"] == done
    assert len(steps) == 2 * (1 + done)
