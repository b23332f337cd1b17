"""What servers combine the plugin with: formats, adapters, speculation, several ranks."""

from __future__ import annotations

import importlib.util
import json

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.engines.vllm.jobs import (
    COMPILING,
    ON,
    RAY,
    TOKENS,
    Job,
    assert_ranks_alike,
    assert_same_tokens,
    attempt,
    calls,
    needs_kernel,
    result,
)
from tests.engines.vllm.models import PROMPTS, SHORT, adapter, int4_head, latent, linears, short, short_w8, without_int4

pytestmark = needs_kernel

OFF_RUN = Job(short())


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_other_formats_have_twins_and_give_the_tokens_of_compressed_tensors(format: str) -> None:
    job = Job(short(format), ON)
    report = result(job)["reports"][0][0]
    assert len(report["twins"]) == linears(job.model)
    assert all(twin["exact"] for twin in report["twins"].values())
    assert_same_tokens(OFF_RUN, job)


def test_an_int4_head_gets_no_twin() -> None:
    off, on = (Job(int4_head(), config) for config in ("{}", json.dumps({"twinweight": {"mode": "soft"}})))
    report = result(on)["reports"][0][0]
    assert set(report["inner"]) > set(report["twins"])
    assert "lm_head" in report["inner"]
    assert "lm_head" not in report["twins"]
    assert_same_tokens(off, on)


def test_latent_attention_computes_with_twins_what_it_did() -> None:
    """vLLM multiplies what expands heads with the identity, through the wrapped kernel, and decodes by that."""
    job = Job(latent(), ON)
    twins = result(job)["reports"][0][0]["twins"]
    kinds = {name.partition("layers.0.")[2] for name in twins if ".layers.0." in name}
    attention = {f"self_attn.{n}" for n in ("fused_qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj")}
    assert kinds == attention | {"mlp.gate_up_proj", "mlp.down_proj"}
    assert all(twin["exact"] for twin in twins.values())
    assert {path.partition("@")[0] for path in calls(job, 2)} == {"int4", "twin"}
    assert_same_tokens(Job(latent()), job, least=0.05)  # random weights are rarely sure


def test_groups_that_our_kernels_do_not_take_are_measured_without_them() -> None:
    job = Job(short(group_size=16), json.dumps({"twinweight": {"mode": "soft"}}))
    report = result(job)["reports"][0][0]
    assert report["copies"] == 0
    assert "could not time" not in result(job)["log"]
    assert all("stream" not in route for route in report["routes"].values())
    assert_same_tokens(OFF_RUN, job)


def test_a_model_without_int4_weights_is_served_as_it_is() -> None:
    job = Job(without_int4(), json.dumps({"twinweight": {"mode": "soft"}}), more=json.dumps({"load_format": "dummy"}))
    report = result(job)["reports"][0][0]
    assert (report["twins"], report["copies"], report["routes"]) == ({}, 0, {})
    assert "no W4A16 layer" in result(job)["log"]


def test_w8a16_has_no_kernel_on_a_cpu_with_the_plugin_or_without() -> None:
    found = attempt(Job(short_w8(), ON))
    assert "CPUWNA16 requires" in found["error"] or "not supported by CPUWNA16" in found["error"], found["error"]


def test_an_adapter_works_on_a_base_weight_with_a_twin() -> None:
    more = json.dumps({"enable_lora": True, "max_lora_rank": 8})
    off, on = Job(short(), adapter=adapter(), more=more), Job(short(), ON, adapter=adapter(), more=more)
    assert_same_tokens(off, on)
    assert result(off)["ids"] != result(OFF_RUN)["ids"]
    assert len(result(on)["reports"][0][0]["twins"]) == 4 * SHORT
    assert calls(on, 2)["twin@256"] > 0


def test_speculated_tokens_stay_on_int4() -> None:
    more = json.dumps({
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    })  # fmt: skip
    on = json.dumps({"twinweight": {"mode": "soft", "crossover": 2, "workload": [64]}})
    prompts = (PROMPTS[0] * 3, PROMPTS[0])
    # After numba, which proposes tokens here, no second server starts in the process: vLLM trips over a module of its.
    job = Job(short(), on, more=more, prompts=prompts, environ=(("PROCESS", "speculation"),))
    assert_same_tokens(Job(short(), prompts=prompts), job)
    alone = calls(job, 1)
    assert alone.pop("int4@4") > 0, alone  # one sequence and three guesses
    assert all(path.startswith("int4@") for path in alone if int(path.partition("@")[2]) <= 4), alone
    assert any(path.startswith("twin@") for path in alone)


COMPILED = Job(short(group_size=64), ON, eager=False, more='{"tensor_parallel_size": 2}', environ=COMPILING)


def test_two_compiled_ranks_decide_alike_and_agree_with_one() -> None:
    assert_same_tokens(OFF_RUN, COMPILED)
    ranks = result(COMPILED)["reports"][0]
    assert len(ranks) == 2
    assert [len(rank["twins"]) for rank in ranks] == [4 * SHORT] * 2
    assert list(ranks[0]["twins"]) == list(ranks[1]["twins"])
    assert all(twin["exact"] for rank in ranks for twin in rank["twins"].values())


@pytest.mark.parametrize("rank", range(2))
def test_compiled_decode_runs_the_inner_kernel_after_a_prefill_shaped_warm_up(rank: int) -> None:
    assert calls(COMPILED, 0, rank) == {"twin@256": 4 * SHORT}
    alone = calls(COMPILED, 1, rank)
    assert alone.pop("int4@1") == 4 * SHORT * (TOKENS - 1)
    assert alone in ({"twin@32": 4 * SHORT}, {"twin@16": 4 * SHORT})


def test_stages_of_a_pipeline_have_twins_of_their_own_layers() -> None:
    """Compiled: without its warm-up vLLM's pipelines do not run on CPUs, with the plugin or without."""
    job = Job(short(group_size=64), ON, eager=False, more='{"pipeline_parallel_size": 2}', environ=COMPILING)
    assert_same_tokens(OFF_RUN, job)
    stages = [stage["twins"] for stage in result(job)["reports"][0]]
    assert [len(twins) for twins in stages] == [4 * SHORT // 2] * 2
    assert stages[0].keys().isdisjoint(stages[1])
    assert all(twin["exact"] for twins in stages for twin in twins.values())
    assert calls(job, 1, rank=0) == calls(job, 1, rank=1)
    assert calls(job, 2)["twin@256"] > 0


def test_ray_workers_measure_and_plan_alike() -> None:
    more = '{"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}'
    job = Job(short(group_size=64), '{"twinweight": {"mode": "soft"}}', more=more, environ=RAY)
    assert_same_tokens(OFF_RUN, job)
    assert_ranks_alike(job)
