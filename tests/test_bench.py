"""How often `bench` repeats its arms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.test_hf import TINY
from twinweight import synth
from twinweight.bench import Workload, bench
from twinweight.engines.hf import load


@pytest.mark.parametrize(("repeats", "seconds", "done"), [(2, 0.0, 2), (5, 0.0, 3), (5, 1e9, 5)])
def test_repeats_end_when_time_is_up_but_not_before_three(tmp_path: Path, repeats: int, seconds: float, done: int) -> None:
    synth.write(TINY, tmp_path / "model")
    model = load(tmp_path / "model", device="cpu", progress=False)
    steps: list[str] = []
    result = bench(model, Workload(8, 2), repeats=repeats, seconds=seconds, step=steps.append)
    assert result["workload"]["repeats"] == done
    assert len(steps) == 2 * (1 + done)
