"""`bench --engine vllm`: the same server without twins and with, each in processes of its own, by vLLM's request metrics."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from twinweight.engines.vllm.arm import DEFAULTS, DETERMINISTIC, STEP, TIMES, Job, as_json
from twinweight.engines.vllm.arm import Workload as Workload
from twinweight.engines.vllm.config import KEY
from twinweight.errors import ConfigError, TwinweightError
from twinweight.plan import GIB, Mode
from twinweight.timing import Timing

ARMS = ("off", "on")


def bench(
    model: Path,
    work: Workload,
    *,
    mode: Mode = "soft",
    dtype: str = "dense",
    head: str = "dense",
    kv_floor: int | None = None,
    engine_args: dict[str, Any] | None = None,
    rounds: int = 1,
    step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Serve `model` off, on, off, on, ... `rounds` times, and compare.

    dtype, head: of the twins and of the output head of "on", as in `config.Config`.
    engine_args: arguments of vllm.LLM for both arms. `max_model_len` is what the workload needs unless it is among them.
    Returns {"environment", "workload", "records": [{"model", "mode", "inner_kernel", "tp", "prompt_tokens", "concurrency",
    "ttft_ms", "tpot_ms", "itl_ms", "kv_tokens", "startup_s", ...}], "arms", "ratios", "noise"}. Ratios by point: above 1 is a
    gain for `ttft` (off / on) and a loss for `tpot` and `itl` (on / off); `noise` is off against itself, its even repeats over
    its odd ones.
    Raises ConfigError where vLLM is missing, TwinweightError where a server fails.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"--engine vllm needs vLLM, which {sys.executable} does not have")
    if not model.is_dir():
        raise ConfigError(f"{model} is not a directory")
    if mode == "off":
        raise ConfigError("mode is 'off', which is one of the two arms: expected soft or hard for the other")
    longest = -(-(max(p for p, _ in work.points) + work.output_tokens) // 1024) * 1024
    llm = {"model": str(model), "max_model_len": longest, **(engine_args or {})}
    given = llm.pop("additional_config", {})
    own = {"mode": mode, "dtype": dtype, "head": head} | ({} if kv_floor is None else {"kv_floor": kv_floor})
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for round_ in range(rounds):
        for arm in ARMS:
            job = Job({**llm, "additional_config": {**given, KEY: own} if arm == "on" else given}, work)
            say = functools.partial(_say, step, f"{arm}, round {round_ + 1} of {rounds}: ")
            runs[arm].append(_alone(job, say))
    return summary(model.name, work, runs, int(llm.get("tensor_parallel_size", 1)))


def _say(step: Callable[[str], None] | None, where: str, text: str) -> None:
    if step is not None:
        step(where + text)


def _alone(job: Job, step: Callable[[str], None]) -> dict[str, Any]:
    """Run one arm in a process of its own. Raises TwinweightError with its last lines where it fails."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TWINWEIGHT_", "VLLM_W4A16_PREFILL_BF16"))}
    step("starting")
    last: deque[str] = deque(maxlen=25)
    with tempfile.TemporaryDirectory() as tmp:
        given, found = Path(tmp) / "job.json", Path(tmp) / "result.json"
        given.write_text(as_json(job), encoding="utf-8")
        command = [sys.executable, "-m", "twinweight.engines.vllm.arm", str(given), str(found)]
        with subprocess.Popen(
            command, env=environ, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                for line in process.stdout or ():
                    if line.startswith(STEP):
                        step(line.removeprefix(STEP).strip())
                    else:
                        last.append(line)
            except BaseException:
                process.terminate()
                raise
        if process.returncode or not found.exists():
            raise TwinweightError(f"vLLM ended with code {process.returncode}; its last lines:\n{''.join(last)}")
        result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        return result


def summary(model: str, work: Workload, runs: dict[str, list[dict[str, Any]]], tp: int) -> dict[str, Any]:
    """What `bench` returns, from the results of `arm.run`, one for each arm and round."""
    samples = {arm: _samples(found) for arm, found in runs.items()}
    records = [record for arm, found in runs.items() for record in records_of(model, arm, tp, found)]
    pairs = {point: (samples["off"][point], samples["on"][point]) for point in work.points}
    return {
        "environment": environment(runs["on"][0]["vllm"]),
        "workload": {"output_tokens": work.output_tokens, "repeats": work.repeats, "rounds": len(runs["on"])},
        "records": records,
        "ratios": [_point(p) | _ratios(off, on) for p, (off, on) in pairs.items()],
        "noise": [
            _point(p) | _ratios({k: v[::2] for k, v in off.items()}, {k: v[1::2] for k, v in off.items()})
            for p, (off, _) in pairs.items()
            if len(off["ttft_s"]) > 1
        ],
        "arms": {arm: _arm(found) for arm, found in runs.items()},
    }


def environment(vllm_version: str) -> dict[str, Any]:
    """What the numbers depend on: machine, threads, versions."""
    import torch

    import twinweight
    from twinweight.bench import cpu_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or cpu_name(), "cores": psutil.cpu_count(logical=False), "memory_gib":
        round(psutil.virtual_memory().total / GIB, 1), "python": platform.python_version(), "torch": torch.__version__,
        "vllm": vllm_version, "twinweight": twinweight.__version__, "date": time.strftime("%Y-%m-%d"),
        "preloaded": [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p],
        "inductor_deterministic": os.environ.get(DETERMINISTIC, DEFAULTS[DETERMINISTIC]) == "1",
    }  # fmt: skip


Samples = dict[tuple[int, int], dict[str, list[float]]]


def _samples(found: list[dict[str, Any]]) -> Samples:
    """Seconds by point, those of all rounds."""
    out: Samples = {}
    for run in found:
        for p in run["points"]:
            of_point = out.setdefault((p["prompt_tokens"], p["concurrency"]), {name: [] for name in TIMES})
            for name, values in of_point.items():
                values.extend(p[name])
    return out


def records_of(model: str, mode: str, tp: int, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a point, from what `arm.run` returned in each round; beside each median, the least and the most."""
    arm, records = _arm(found), []
    for point, times in _samples(found).items():
        record: dict[str, Any] = {
            "model": model, "mode": mode, "inner_kernel": found[0]["inner_kernel"], "tp": tp, **_point(point),
            "kv_tokens": arm["kv_tokens"], "startup_s": arm["startup_s"], "twins": arm["twins"],
            "copies": arm["copies"],
        }  # fmt: skip
        for name in TIMES:
            ms = Timing.of(times[name]).scaled(1e3, 4)
            key = name.removesuffix("_s") + "_ms"
            record |= {key: ms["median"], f"{key}_range": [ms["min"], ms["max"]]}
        records.append(record)
    return records


def _arm(found: list[dict[str, Any]]) -> dict[str, Any]:
    report = found[0]["twinweight"]
    return {
        "kv_tokens": min(f["kv_tokens"] for f in found),
        "startup_s": round(Timing.of([f["startup_s"] for f in found]).median, 1),
        "startups_s": [round(f["startup_s"], 1) for f in found],
        "twins": len(report["twins"]) if report else 0,
        "copies": report["copies"] if report else 0,
        "weights": len(report["inner"]) if report else None,
        "twin_gib": round(report.get("bytes", 0) / GIB, 4) if report else 0.0,
        "routes": report.get("routes", {}) if report else {},
    }


def _point(point: tuple[int, int]) -> dict[str, int]:
    return {"prompt_tokens": point[0], "concurrency": point[1]}


def _ratios(off: dict[str, list[float]], on: dict[str, list[float]]) -> dict[str, float]:
    def over(a: list[float], b: list[float]) -> float:
        return round(Timing.of(a).median / Timing.of(b).median, 4)

    later = {name: over(on[f"{name}_s"], off[f"{name}_s"]) for name in ("tpot", "itl")}
    return {"ttft": over(off["ttft_s"], on["ttft_s"]), **later}
