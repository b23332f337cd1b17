"""`twinweight profile --engine vllm` with real vLLM on the CPU, and what `roofline` finds in its traces."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.engines.vllm import jobs, models
from twinweight.engines.vllm.record import record
from twinweight.errors import TwinweightError
from twinweight.roofline.recording import Recipe
from twinweight.roofline.run import roofline

pytestmark = jobs.needs_kernel

PROMPT, OUT = 64, 4


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in jobs.environment().items():
        monkeypatch.setenv(name, value)
    for name in set(os.environ) - set(jobs.environment()):
        monkeypatch.delenv(name)


def test_decode_stays_int4_and_prefill_takes_the_twin(tmp_path: Path) -> None:
    given = json.loads(jobs.ON)  # the crossover is given: which path runs must not depend on the machine
    engine_args = {"enforce_eager": True, "max_num_seqs": 4, "additional_config": given}
    written = record(
        Path(models.TRAINED),
        Recipe(PROMPT, OUT),
        tmp_path,
        settings={"mode": "soft"},
        engine_args=engine_args,
        references=False,
    )
    result = roofline([written["off"], written["on"]], gpu="gfx1151")
    for side in ("before", "after"):
        assert [(p["phase"], p["steps"], p["rows"]) for p in result[side]["phases"][:2]] == [
            ("prefill", 1, [PROMPT]), ("decode", OUT - 1, [1])
        ]  # fmt: skip
    linears = [r for r in result["diff"]["linears"] if "4096" not in r["shape"]]
    assert {r["phase"] for r in linears} == {"prefill", "decode"}
    for row in linears:
        assert row["ops_before"] == ["_C::cpu_gemm_wna16"]
        assert row["ops_after"] == (["aten::mm"] if row["phase"] == "prefill" else ["_C::cpu_gemm_wna16"])
    # The step's label tells the lengths: 6 heads of 64 over 64 tokens, then one token on 65, 66 and 67, in each layer.
    attention = {r["phase"]: r for r in result["after"]["ops"] if r["kind"] == "attention" and r["shape"]}
    layers = int(json.loads((Path(models.TRAINED) / "config.json").read_text())["num_hidden_layers"])
    assert attention["prefill"]["flops"] == layers * 4 * 6 * 64 * PROMPT * PROMPT
    assert attention["decode"]["flops"] == layers * 4 * 6 * 64 * (65 + 66 + 67)


def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(TwinweightError, match=r"(?s)vLLM ended with code 1.*no such thing"):
        record(
            Path(models.TRAINED), Recipe(PROMPT, OUT), tmp_path / "out", settings={"mode": "soft"},
            engine_args={"quantization": "no such thing"}, references=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
