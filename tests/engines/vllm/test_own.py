"""Own int4 copies in real vLLM on the CPU: planned from times in the cache, exact, refilled in place, and counted."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

import torch

from tests.engines.vllm.jobs import TOKENS, Job, assert_same_tokens, attempt, calls, needs_kernel, result
from tests.engines.vllm.models import BUILD, linears, short
from twinweight.cache import VARIABLE, Cache
from twinweight.measured import Measured
from twinweight.timing import Timing

pytestmark = needs_kernel

CACHE = BUILD / "own-times"
MODEL = short()
# An own copy wins at few rows, and expanding it from 16 on; a twin would win by nothing.
MS = (1, 16, 512)
TIMES = {
    "int4": (4.0, 64.0, 2048.0),
    "own": (1.0, 16.0, 512.0),
    "stream": (50.0, 8.0, 64.0),
    "twin:bfloat16": (50.0, 8.0, 64.0),
}


@pytest.fixture(scope="module")
def on() -> Job:
    """The job, whose server finds these times for every kind of layer."""
    from vllm.scalar_type import scalar_types

    from twinweight.engines.vllm import compat
    from twinweight.engines.vllm.kinds import Kind

    config = json.loads((BUILD.parent / MODEL / "config.json").read_text())
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    times = {c: tuple(Timing(us / 1e6, us / 1e6, us / 1e6) for us in row) for c, row in TIMES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)  # the server's, by VLLM_CPU_OMP_THREADS_BIND
        for n, k in ((q + 2 * kv, hidden), (hidden, q), (2 * mlp, hidden), (hidden, mlp)):
            kind = Kind(n, k, 128, str(scalar_types.uint4b8), False, False, torch.bfloat16, "CPUWNA16LinearKernel")
            key = kind.key | {"layers": config["num_hidden_layers"]}  # too few for calls to rotate over
            Cache(CACHE).write(key, torch.device("cpu"), Measured(MS, times, n), vllm=compat.version())
    soft = json.dumps({"twinweight": {"mode": "soft"}})
    return Job(MODEL, soft, reload=(MODEL,), environ=((VARIABLE, str(CACHE)),))


def test_the_plan_takes_copies_and_no_twin(on: Job) -> None:
    found = result(on)
    report = found["reports"][0][0]
    assert report["twins"] == {}
    assert set(report["routes"].values()) == {"int4 from M=1, stream from M=16"}
    assert report["bytes"] > 0
    assert "measured in 0." in found["log"]


def test_decode_and_prefill_run_on_the_copy_with_the_tokens_of_vllm(on: Job) -> None:
    assert_same_tokens(Job(MODEL, reload=(MODEL,)), on, batches=4)  # as many again after a reload
    alone, layers = calls(on, 1), linears(MODEL)
    assert alone.pop("int4@1") == layers * (TOKENS - 1)
    assert alone in ({"stream@32": layers}, {"stream@16": layers})


def test_the_inner_kernel_serves_nothing(on: Job) -> None:
    assert not any(name.startswith("inner") for batch in range(1, 5) for name in calls(on, batch))


@pytest.fixture(scope="module")
def for_good(on: Job) -> Job:
    """The same server, whose weights stay what they are."""
    return replace(on, additional=json.dumps({"twinweight": {"mode": "soft", "reload": False}}), reload=())


def test_where_weights_stay_the_copies_replace_those_of_vllm(on: Job, for_good: Job) -> None:
    assert_same_tokens(Job(MODEL, reload=(MODEL,)), for_good)
    report, before = (result(job)["reports"][0][0] for job in (for_good, on))
    assert before["freed"] == 0
    assert report["copies"] == before["copies"] == linears(MODEL)
    assert report["freed"] >= 0.9 * report["bytes"]  # packed words and scales, as the copies have
    assert "of vLLM's int4 weights freed" in result(for_good)["log"]


def test_and_are_not_reloaded(for_good: Job) -> None:
    found = attempt(replace(for_good, reload=(MODEL,)))
    assert "RuntimeError: Twinweight: no reload_weights here" in found["error"]
