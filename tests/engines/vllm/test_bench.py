"""`bench --engine vllm` on real servers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.engines.vllm.jobs import environment, needs_kernel
from tests.engines.vllm.models import SHORT, short
from twinweight.engines.vllm.bench import Workload, bench

pytestmark = needs_kernel


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def test_off_and_on_are_measured_through_vllm() -> None:
    steps: list[str] = []
    args = {"enforce_eager": True, "max_num_seqs": 2, "max_num_batched_tokens": 256}
    found = bench(Path(short()), Workload(((200, 1), (64, 2)), 4, repeats=2), engine_args=args, step=steps.append)
    assert [(r["mode"], r["prompt_tokens"], r["concurrency"]) for r in found["records"]] == [
        (mode, *point) for mode in ("off", "on") for point in ((200, 1), (64, 2))
    ]
    for record in found["records"]:
        assert record["inner_kernel"] == "CPUWNA16LinearKernel"
        assert 0 < record["ttft_ms_range"][0] <= record["ttft_ms"] <= record["ttft_ms_range"][1]
        assert 0 < record["tpot_ms_range"][0] <= record["tpot_ms"] <= record["tpot_ms_range"][1]
        assert 0 < record["itl_ms_range"][0] <= record["itl_ms"] <= record["itl_ms_range"][1]
        assert record["itl_ms"] == record["tpot_ms"] or record["concurrency"] > 1
        assert record["kv_tokens"] > 0
        assert record["startup_s"] > 0
    assert found["arms"]["off"]["twins"] == 0
    assert found["arms"]["on"]["weights"] == 4 * SHORT
    assert len(found["ratios"]) == len(found["noise"]) == 2
    assert "on, round 1 of 1: 64 tokens, 2 at once" in steps
