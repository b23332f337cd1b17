"""Results of every command that has a page, from committed files: what the tests of tables, plots and pages show."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinweight import pages, planner
from twinweight.page import Page
from twinweight.roofline.run import roofline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
TRACES = Path(__file__).parent / "data/roofline"
STAMP = {"environment": {"python": "3.11", "date": "2026-11-24"}, "command": "twinweight ... --html 'a b.html'"}


@functools.cache
def _text(name: str) -> str:
    return (RESULTS / name).read_text(encoding="utf-8")


def bench() -> dict[str, Any]:
    """`bench --engine hf`."""
    found: dict[str, Any] = json.loads(_text("cpu/llama-3.1-8b-2-layers.json"))
    return found


def served() -> dict[str, Any]:
    """`bench --engine vllm`, one point."""
    found: dict[str, Any] = json.loads(_text("cpu/vllm-llama-3.1-8b-2l.json"))
    return found


def served_at(*points: tuple[int, int]) -> dict[str, Any]:
    """`bench --engine vllm` with more points, times made up: on is slower at the last."""
    result = served()
    result["records"], result["ratios"] = [], []
    for i, (prompt, at_once) in enumerate(points):
        gain = 0.8 if i == len(points) - 1 else 1.5
        for mode, ttft in (("off", 10.0 * prompt), ("on", 10.0 * prompt / gain)):
            result["records"].append({
                "model": "m", "mode": mode, "prompt_tokens": prompt, "concurrency": at_once, "ttft_ms": ttft, "tpot_ms": 2.0,
                "ttft_ms_range": [ttft * 0.9, ttft * 1.1], "tpot_ms_range": None,
            })  # fmt: skip
        result["ratios"].append({"prompt_tokens": prompt, "concurrency": at_once, "ttft": gain, "tpot": 1.0})
    return result


def tune() -> dict[str, Any]:
    """`tune --check`."""
    found: dict[str, Any] = {"cache": None, **STAMP, **json.loads(_text("cpu/tune-llama-3.1-8b.json"))}
    return found


@functools.cache
def _plan(gpu: str, model: str) -> str:
    return json.dumps(planner.plan_model(model, planner.Request(gpu, 1, max_model_len=8192)))


def plan(gpu: str = "rtx4090", model: str = "llama-3.1-8b") -> dict[str, Any]:
    """`plan`."""
    return {**json.loads(_plan(gpu, model)), **STAMP}


@functools.cache
def _roofline(*names: str) -> str:
    return json.dumps(roofline([TRACES / f"{name}.json.gz" for name in names]))


def traced(*names: str) -> dict[str, Any]:
    """`roofline` of one trace or two."""
    return {**json.loads(_roofline(*names)), **STAMP}


def demo() -> dict[str, Any]:
    """`demo`; what the committed file does not have yet is made up."""
    result = json.loads(_text("cpu/demo.json"))
    arms = {f"{key}_{arm}": value for key, value in (("kl", 1e-6), ("top1", 0.999)) for arm in ("int4", "twin", "mixed")}
    lossy = [{"kind": "fp8-row", "emulated": True, "ppl": 7.83, "kl": 1e-3, "top1": 0.98}]
    result["quality"] = {
        "lossy": lossy,
        "int4_cost": {"tokens": 8192, "ppl_bf16": 7.7, "ppl_int4": 7.8},
        **arms,
        **result["quality"],
    }
    return {**result, "environment": result["bench"]["environment"], "command": "twinweight demo"}


PAGES: dict[str, tuple[Callable[[], Page], int]] = {
    "bench": (lambda: pages.bench_page(bench()), 2),
    "vllm": (lambda: pages.bench_page(served()), 2),
    "vllm-points": (lambda: pages.bench_page(served_at((512, 1), (512, 32), (8192, 1))), 2),
    "tune": (lambda: pages.tune_page(tune()), 4),
    "plan": (lambda: pages.plan_page(plan()), 1),
    "plan-too-small": (lambda: pages.plan_page(plan("rtx4090", "llama-3.3-70b")), 1),
    "roofline": (lambda: pages.roofline_page(traced("h200-eager-on"), 30), 2),
    "roofline-cpu": (lambda: pages.roofline_page(traced("cpu-on"), 5), 2),
    "roofline-two": (lambda: pages.roofline_page(traced("h200-graphs-off", "h200-graphs-on"), 30), 3),
    "demo": (lambda: pages.demo_page(demo()), 2),
}
"""Each page, and how many plots it has."""
