"""Jobs for servers of real vLLM on the CPU, and their results: equal jobs run once, all in as few processes as can be."""

from __future__ import annotations

import atexit
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm import models

ROOT = models.ROOT
CACHE = ROOT / "build" / "vllm-cache"
TOKENS = 12
CROSSOVER = 16  # given, not measured: which path ran must not depend on the machine
ON = json.dumps({"twinweight": {"mode": "soft", "crossover": CROSSOVER}})
SIZES = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 4}
"""Of every server, as arguments of LLM."""
CLEAR = 0.25
"""A lead that no rounding of bf16 turns; where it is less, runs may part."""

CPU_INFO = Path("/proc/cpuinfo")
needs_kernel = pytest.mark.skipif(
    platform.machine() == "x86_64" and CPU_INFO.exists() and " avx512f " not in CPU_INFO.read_text(),
    reason="vLLM's W4A16 kernel for CPUs needs AVX-512: without it vLLM serves no such model, with the plugin or without",
)
"""Mark of what starts a server."""

Environ = tuple[tuple[str, str], ...]
COMPILING: Environ = (("VLLM_CPU_OMP_THREADS_BIND", "0|1"), ("TORCH_COMPILE_DISABLE", "0"))
RAY: Environ = (
    ("VLLM_CPU_OMP_THREADS_BIND", "0|1"),
    ("PYTHONPATH", f"{models.ray_platform()}:{ROOT}"),
    ("RAY_AUTH_MODE", "disabled"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
)


def environment(given: Environ = ()) -> dict[str, str]:
    """What every server gets; vLLM reads some of it once in a process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "TWINWEIGHT_", "VLLM_", "PROMETHEUS_"))}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_INT4_W4A8": "0",  # else CPUs with AMX quantize activations
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(CACHE),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles some functions in eager mode too: 20 s with cold caches
        **dict(given),
    }


@dataclass(frozen=True)
class Job:
    """A job of `host.py`; more: further arguments of LLM, as JSON. environ: another environment is another process, and so is
    another command that it runs in (within).
    """

    model: str
    additional: str = "{}"
    eager: bool = True
    reload: tuple[str, ...] = ()
    adapter: str | None = None
    more: str = "{}"
    prompts: tuple[tuple[int, ...], ...] = models.PROMPTS
    environ: Environ = field(default=())
    within: tuple[str, ...] = ()


class Host:
    """A process of `host.py` and its log."""

    def __init__(self, environ: Environ, within: tuple[str, ...]) -> None:
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*within, sys.executable, str(Path(__file__).with_name("host.py"))], env=environment(environ), text=True, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, errors="replace",
        )  # fmt: skip
        atexit.register(self.process.kill)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The result, and under "log" what was printed meanwhile."""
        start, printed = os.fstat(self.log.fileno()).st_size, []
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                break
            printed.append(line)
        else:
            raise AssertionError("the process ended: " + "".join(printed)[-2000:] + self._since(start)[-6000:])
        result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
        return result | {"log": "".join(printed) + self._since(start)}

    def _since(self, start: int) -> str:
        return os.pread(self.log.fileno(), 1 << 24, start).decode(errors="replace")


@functools.cache
def host(environ: Environ, within: tuple[str, ...]) -> Host:
    """The process for an environment."""
    return Host(environ, within)


@functools.cache
def attempt(job: Job) -> dict[str, Any]:
    """The result of a job, which may be an error."""
    llm = {
        "model": job.model,
        **SIZES,
        "enforce_eager": job.eager,
        "additional_config": json.loads(job.additional),
        **json.loads(job.more),
    }
    given = {"llm": llm, "tokens": TOKENS, "prompts": job.prompts, "reload": job.reload, "adapter": job.adapter}
    return host(job.environ, job.within).run({**given, "batches": [[0], list(range(len(job.prompts)))]})


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of LLM, as `vllm serve` takes them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]


def result(job: Job) -> dict[str, Any]:
    """The result of a job that must succeed."""
    found = attempt(job)
    assert "error" not in found, found["error"] + found["log"][-6000:]
    return found


def times_logged(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """How often a text was logged; up to vLLM 0.31 each record is captured twice."""
    return len({id(record) for record in caplog.records if text in record.message})


def calls(job: Job, batch: int, rank: int = 0) -> dict[str, int]:
    """Calls of the op by path and rows (rounded down to a power of two) that a batch added; batch 0 is the warm-up."""
    reports = result(job)["reports"]
    before = reports[batch - 1][rank]["calls"] if batch else {}
    return {k: n - before.get(k, 0) for k, n in reports[batch][rank]["calls"].items() if n != before.get(k, 0)}


def assert_same_tokens(off: Job, on: Job, batches: int = 2, least: float = 0.5) -> None:
    """Greedy tokens are equal up to the first that led by less than CLEAR without twins; a share of `least` led by more."""
    a, b, compared, total = result(off), result(on), 0, 0
    for batch in range(batches):
        for ids, leads, others in zip(a["ids"][batch], a["leads"][batch], b["ids"][batch], strict=True):
            clear = next((i for i, lead in enumerate(leads) if lead < CLEAR), len(ids))
            assert ids[:clear] == others[:clear], (batch, ids, others, leads)
            compared, total = compared + clear, total + len(ids)
    assert compared >= least * total, (compared, total)


def assert_ranks_alike(job: Job) -> None:
    """Two ranks of the short model have the same plan and routes, twins that are exact, and took the same paths."""
    ranks = result(job)["reports"][0]
    assert len(ranks) == 2
    assert list(ranks[0]["twins"]) == list(ranks[1]["twins"])
    assert ranks[0]["routes"] == ranks[1]["routes"]
    assert len(ranks[0]["inner"]) == 4 * models.SHORT
    assert all(twin["exact"] for rank in ranks for twin in rank["twins"].values())
    assert calls(job, 2, rank=0) == calls(job, 2, rank=1)
