"""The plugin in real vLLM on the CPU. Each run is a process of its own; equal runs are shared between tests."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:  # importing it here would cost each session its ten seconds
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from twinweight.presets import preset
from twinweight.synth import write

ROOT = Path(__file__).parents[3]
TRAINED = str(min(ROOT.glob("models/*/config.json")).parent)
LAYERS = 4 * int(json.loads((Path(TRAINED) / "config.json").read_text())["num_hidden_layers"])
CACHE = ROOT / "build" / "vllm-cache"
CROSSOVER = 16  # given, not measured: which path ran must not depend on the machine
SOFT = {"twinweight": {"mode": "soft", "crossover": CROSSOVER}}
TEXT = (Path(TRAINED) / "heldout.txt").read_text()
SLICES = ((36000, 120), (24000, 2600), (44000, 30))
"""Start and length of prompts whose next 12 tokens each lead by 0.3 or more. An earlier choice met an exact tie of two bf16
logits, which any other rounding turns."""

TOKENS = 12


@dataclass(frozen=True)
class Job:
    """A run of `serve_once.py`."""

    model: str
    additional: str = "{}"
    eager: bool = True
    tp: int = 1
    multiprocessing: bool = False
    reload: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = field(default=())


def environment(job: Job) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "TWINWEIGHT_", "VLLM_"))}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if job.tp == 2 else "0-1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if job.multiprocessing or job.tp > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(CACHE),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        **dict(job.environ),
    }


@functools.cache
def run(job: Job) -> subprocess.CompletedProcess[str]:
    trained = job.model == TRAINED
    prompts: list[Any] = (
        [TEXT[at : at + length] for at, length in SLICES] if trained else [list(range(3, 43)), list(range(50, 650)), [7, 8, 9]]
    )
    given = {
        **asdict(job),
        "llm": {
            "max_model_len": 1024,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 4,
            "enforce_eager": job.eager,
            "tensor_parallel_size": job.tp,
            "skip_tokenizer_init": not trained,
            "additional_config": json.loads(job.additional),
        },
        "plugin": job.additional != "{}",
        "prompts": prompts,
        "batches": [[0], [0, 1, 2]],
        "tokens": TOKENS,
    }
    command = [sys.executable, str(Path(__file__).with_name("serve_once.py")), json.dumps(given)]
    return subprocess.run(command, env=environment(job), capture_output=True, text=True, timeout=280, cwd=ROOT)


def result(job: Job) -> dict[str, Any]:
    done = run(job)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (done.stdout + done.stderr)[-6000:]
    return json.loads(lines[0].removeprefix("RESULT "))  # type: ignore[no-any-return]


def calls(job: Job, batch: int, rank: int = 0) -> dict[str, int]:
    """Calls of the op by path and rows (rounded down to a power of two) that a batch added; batch 0 is the warm-up."""
    reports = result(job)["reports"]
    before = reports[batch - 1][rank]["calls"] if batch else {}
    return {k: n - before.get(k, 0) for k, n in reports[batch][rank]["calls"].items() if n != before.get(k, 0)}


@functools.cache
def synthetic(seed: int) -> str:
    config = preset("llama-3.1-8b", layers=2)
    config.update(
        hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=2048,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    out = ROOT / "build" / f"vllm-synthetic-{seed}"
    write(config, out, seed=seed)
    return str(out)


def models() -> list[str]:
    return [TRAINED, synthetic(0)]


ON = json.dumps(SOFT)


@pytest.mark.parametrize("which", [0, 1], ids=["trained", "synthetic"])
def test_on_and_off_give_the_same_greedy_tokens(which: int) -> None:
    model = models()[which]
    reload = (synthetic(1), model) if which else ()
    assert result(Job(model))["ids"] == result(Job(model, ON, reload=reload))["ids"][:2]


def test_compiled_runs_give_the_same_greedy_tokens() -> None:
    off, on = Job(TRAINED, eager=False), Job(TRAINED, ON, eager=False, multiprocessing=True)
    assert result(off)["ids"] == result(on)["ids"]


@pytest.mark.parametrize("compiled", [False, True])
def test_decode_runs_the_inner_kernel_after_a_prefill_shaped_warm_up(compiled: bool) -> None:
    job = Job(TRAINED, ON, eager=not compiled, multiprocessing=compiled)
    if compiled:
        assert calls(job, 0) == {"twin@256": LAYERS}
    alone = calls(job, 1)
    assert alone.pop("int4@1") == LAYERS * (TOKENS - 1)
    assert alone in ({"twin@32": LAYERS}, {"twin@16": LAYERS})


def test_prefills_in_chunks_mixed_with_decodes_run_the_twin() -> None:
    together = calls(Job(TRAINED, ON), 2)
    assert together["twin@256"] == LAYERS * 2, together  # full chunks, decoding rows among them
    assert set(together) <= {"twin@256", "twin@128", "twin@64", "twin@32", "int4@1", "int4@2"}, together
    assert together["int4@2"] > 0


@pytest.mark.parametrize("which", [0, 1], ids=["trained", "synthetic"])
def test_every_twin_is_what_the_inner_kernel_computes(which: int) -> None:
    model = models()[which]
    report = result(Job(model, ON, reload=(synthetic(1), model) if which else ()))["reports"][0][0]
    assert set(report["inner"].values()) == {"CPUWNA16LinearKernel"}
    assert len(report["twins"]) == len(report["inner"]) == (8 if which else LAYERS)
    assert all(twin["exact"] for twin in report["twins"].values())


def test_reloading_refreshes_twins_in_place() -> None:
    found = result(Job(synthetic(0), ON, reload=(synthetic(1), synthetic(0))))
    first, second, third = found["ids"][:2], found["ids"][2:4], found["ids"][4:]
    assert first == third
    assert first != second
    addresses = [{name: t["address"] for name, t in ranks[0]["twins"].items()} for ranks in found["reports"]]
    assert all(a == addresses[0] for a in addresses)
    assert all(t["exact"] for ranks in found["reports"] for t in ranks[0]["twins"].values())


def test_two_ranks_decide_alike_and_agree_with_one() -> None:
    job = Job(synthetic(0), json.dumps({"twinweight": {"mode": "soft"}}), tp=2)
    found = result(job)
    assert found["ids"] == result(Job(synthetic(0), tp=2))["ids"]
    ranks = found["reports"][0]
    assert len(ranks) == 2
    assert list(ranks[0]["twins"]) == list(ranks[1]["twins"])
    assert calls(job, 2, rank=0) == calls(job, 2, rank=1)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(TRAINED, '{"twinweight": {"mode": "soft", "kvfloor": 1}}', multiprocessing=True), "unknown field 'kvfloor'"),
        (Job(TRAINED, environ=(("TWINWEIGHT_MODE", "on"),)), "TWINWEIGHT_MODE: mode is 'on', expected one of off, soft, hard"),
    ],
    ids=["field", "variable"],
)
def test_a_bad_setting_stops_start_up(job: Job, message: str) -> None:
    done = run(job)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_off_says_nothing() -> None:
    done = run(Job(TRAINED))
    assert "winweight" not in (done.stdout + done.stderr).replace(str(ROOT), "")


def test_one_line_at_start_up_says_what_was_done() -> None:
    done = run(Job(TRAINED, ON))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "Twinweight soft:" in line]
    assert len(lines) == 1
    assert f"{LAYERS} twins built, 0 missed" in lines[0]
    assert "floor 1024" in lines[0]
    assert f"twin from M={CROSSOVER}" in lines[0]
