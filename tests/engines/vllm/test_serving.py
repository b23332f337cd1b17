"""Tokens, paths, twins, reloading and start-up of the plugin in real vLLM on the CPU."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch

if importlib.util.find_spec("vllm") is None:  # importing it here would cost each session its ten seconds
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.engines.vllm.jobs import CROSSOVER, ON, TOKENS, Job, assert_same_tokens, attempt, calls, needs_kernel, result
from tests.engines.vllm.models import ROOT, TRAINED, linears, short, synthetic

pytestmark = needs_kernel

OFF_RUN, ON_RUN = Job(TRAINED), Job(TRAINED, ON)
RANDOM = Job(synthetic(0), ON, reload=(synthetic(1), synthetic(0)))


def test_off_says_nothing() -> None:
    assert "winweight" not in result(OFF_RUN)["log"].replace(str(ROOT), "")


def test_on_and_off_give_the_same_greedy_tokens() -> None:
    assert_same_tokens(OFF_RUN, ON_RUN)


def test_off_after_on_is_off_again() -> None:
    off = result(Job(short()))
    assert off["reports"] == [[]] * 3
    assert "winweight" not in off["log"].replace(str(ROOT), "")


def test_a_small_output_head_is_found_and_stays_vllms() -> None:
    assert result(ON_RUN)["reports"][0][0]["heads"] == [False]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM quantizes activations of W4A16 where there is AMX")
def test_what_quantizes_activations_is_left_alone() -> None:
    environ = (("VLLM_CPU_INT4_W4A8", "1"),)
    off, on = Job(short(), environ=environ), Job(short(), ON, environ=environ)
    assert_same_tokens(off, on)
    report = result(on)["reports"][-1][0]
    assert report["twins"] == {}
    assert "alone: activations are quantized; VLLM_CPU_INT4_W4A8=0 leaves them in 16 bits" in result(on)["log"]


def test_decode_runs_the_inner_kernel() -> None:
    layers, alone = linears(TRAINED), calls(ON_RUN, 1)
    assert alone.pop("int4@1") == layers * (TOKENS - 1)
    assert alone in ({"twin@32": layers}, {"twin@16": layers})


def test_prefills_in_chunks_mixed_with_decodes_run_the_twin() -> None:
    together, layers = calls(ON_RUN, 2), linears(TRAINED)
    assert together["twin@256"] == layers * 2, together  # full chunks, decoding rows among them
    assert set(together) <= {"twin@256", "twin@128", "twin@64", "twin@32", "int4@1", "int4@2"}, together
    assert together["int4@2"] > 0


@pytest.mark.parametrize("job", [ON_RUN, RANDOM], ids=["trained", "synthetic"])
def test_every_twin_is_what_the_inner_kernel_computes(job: Job) -> None:
    report = result(job)["reports"][0][0]
    assert set(report["inner"].values()) == {"CPUWNA16LinearKernel"}
    assert len(report["twins"]) == len(report["inner"]) == linears(job.model)
    assert all(twin["exact"] for twin in report["twins"].values())


def test_reloading_refreshes_twins_in_place() -> None:
    found = result(RANDOM)
    first, second, third = found["ids"][:2], found["ids"][2:4], found["ids"][4:]
    assert first == third
    assert first != second
    addresses = [{name: t["address"] for name, t in ranks[0]["twins"].items()} for ranks in found["reports"]]
    assert all(a == addresses[0] for a in addresses)
    assert all(t["exact"] for ranks in found["reports"] for t in ranks[0]["twins"].values())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"mode": "soft", "kvfloor": 1}, "unknown field 'kvfloor'"), ({"mode": "on"}, "expected one of off, soft, hard")],
)
def test_a_bad_setting_stops_start_up(given: dict[str, object], message: str) -> None:
    found = attempt(Job(short(), json.dumps({"twinweight": given})))
    assert message in found["error"]


def test_a_bad_variable_stops_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinweight.engines.vllm import register
    from twinweight.errors import ConfigError

    monkeypatch.setenv("TWINWEIGHT_MODE", "on")
    with pytest.raises(ConfigError, match="TWINWEIGHT_MODE: mode is 'on', expected one of off, soft, hard"):
        register()


def test_one_line_at_start_up_says_what_was_done() -> None:
    lines = [line for line in result(ON_RUN)["log"].splitlines() if "Twinweight soft:" in line]
    assert len(lines) == 1
    assert re.search(rf"soft: {linears(TRAINED)} twins( and \d+ int4 copies)? built, 0 missed", lines[0])
    assert "floor 1024" in lines[0]
    assert f"twin from M={CROSSOVER}" in lines[0]
