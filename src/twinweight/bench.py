"""`bench`: off and on, interleaved, on one loaded model: time to first token, time per output token, and what memory is
left.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from twinweight.engines.hf import kv_bytes_per_token
from twinweight.errors import ConfigError
from twinweight.memory import read_memory
from twinweight.paths import Path
from twinweight.plan import GIB
from twinweight.timing import Timing
from twinweight.twins import forced, int4_linears, state_of, twin_bytes, twins_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAST = 3  # repeats
_TIMES = ("ttft_ms", "prefill_tok_s", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class Workload:
    """prompt_tokens and output_tokens a sequence, `batch` sequences at once, and perhaps one image (width, height) in each
    prompt.
    """

    prompt_tokens: int = 1024
    output_tokens: int = 32
    batch: int = 1
    image: tuple[int, int] | None = None


class _Clock:
    """A streamer for `generate`: notes when the prompt and when each token came."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).synchronize()
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do at the end of a sequence."""


@dataclass
class _Arm:
    """Samples of one arm, in seconds."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)

    def add(self, start: float, at: list[float]) -> None:
        # at[0] is the prompt handed to the streamer, at[1] the first token.
        self.ttft.append(at[1] - start)
        self.e2e.append(at[-1] - start)
        if len(at) > 2:
            self.tpot.append((at[-1] - at[1]) / (len(at) - 2))


def bench(
    model: PreTrainedModel,
    work: Workload,
    *,
    repeats: int = 5,
    warmup: int = 1,
    seconds: float = math.inf,
    dense: bool = False,
    step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run off, on, off, on, ... and compare. Each repeat has a prompt of its own, which its arms share.

    seconds: after so long no further repeat is begun, beyond the three that a median takes. dense: a third arm sends decode to
    the twins too, which is what serving the dense weights does.
    Returns {"arms": {"off", "on"}, "ratios", "noise", "environment"}. A ratio above 1 is a gain for `ttft` and `e2e` (off / on)
    and a loss for `tpot` (on / off). `noise` holds the same ratios of off against itself, its even repeats over its odd ones.
    Raises ConfigError where the model has no place for so many tokens, or the memory that is free none for their KV cache.
    """
    check_room(model, work)
    arms = {"off": _Arm(), "on": _Arm()} | ({"dense": _Arm()} if dense else {})
    began, done = time.perf_counter(), 0
    for repeat in range(-warmup, repeats):
        if repeat >= _LEAST and time.perf_counter() - began > seconds:
            break
        done = max(0, repeat + 1)
        inputs = make_inputs(model, work, seed=repeat)
        for name, arm in arms.items():
            with twins_in_use(model, name != "off"), forced(model, Path.TWIN) if name == "dense" else nullcontext():
                start, at = _generate(model, inputs, work.output_tokens)
            if repeat >= 0:
                arm.add(start, at)
            if step is not None:
                step(f"{name} {done}/{repeats}")
    prompt = int(inputs["input_ids"].numel())
    return {
        "arms": {name: _summary(model, arm, prompt, on=name != "off") for name, arm in arms.items()},
        "ratios": _ratios(arms["off"], arms["on"]),
        "noise": _ratios(_half(arms["off"], 0), _half(arms["off"], 1)) if done > 1 else None,
        "workload": {
            "prompt_tokens": prompt // work.batch, "output_tokens": work.output_tokens, "batch": work.batch, "image":
            work.image, "repeats": done,
        },
        "routes": routes(model),
        "environment": environment(model),
    }  # fmt: skip


def check_room(model: PreTrainedModel, work: Workload) -> None:
    """Raise ConfigError where the model has no place for so many tokens, or the memory that is free none for them."""
    prompt = make_inputs(model, replace(work, batch=1), seed=0)["input_ids"].shape[1]
    text, tokens = model.config.get_text_config(), prompt + work.output_tokens
    longest = getattr(text, "max_position_embeddings", None) or tokens
    if tokens > longest:
        raise ConfigError(
            f"{prompt} prompt and {work.output_tokens} output tokens are more than the model's {longest} positions"
        )
    widest = max((max(m.in_features, m.out_features) for m in int4_linears(model).values()), default=text.hidden_size)
    cache = work.batch * tokens * kv_bytes_per_token(model.config, model.dtype)
    activations = work.batch * prompt * (widest + 2 * text.hidden_size) * 4
    free = read_memory(model.device).free
    if cache + activations > free:
        raise ConfigError(
            f"{work.batch} x {tokens} tokens need {cache / GIB:.2f} GiB of KV cache and some {activations / GIB:.2f} GiB of "
            f"activations, and {free / GIB:.2f} GiB of memory are free"
        )


def make_inputs(model: PreTrainedModel, work: Workload, seed: int) -> dict[str, Tensor]:
    """Random token ids [batch, prompt_tokens], with an image's patches before them where the workload has one."""
    from twinweight.image import image_inputs

    generator = torch.Generator().manual_seed(seed + 1000)
    text = model.config.get_text_config()
    # The upper quarter of a vocabulary holds special tokens, among them those that stand for images.
    ids = torch.randint(0, text.vocab_size * 3 // 4, (work.batch, work.prompt_tokens), generator=generator)
    if work.image is None:
        return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    return image_inputs(model, ids, work.image, generator)


def routes(model: PreTrainedModel) -> dict[str, str]:
    """Which rows take which path, per distinct shape, as text: "NxK": "int4 from M=1, twin from M=16"."""
    out: dict[str, str] = {}
    for linear in int4_linears(model).values():
        key = f"{linear.out_features}x{linear.in_features}"
        route = linear.route_with_twin if linear.twin is not None else linear.route_without_twin
        twin = f" ({linear.twin_kind} twin)" if linear.twin is not None else ""
        out.setdefault(key, str(route) + twin)
    return out


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What the numbers depend on: machine, threads, versions, model."""
    import transformers

    import twinweight

    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "device": gpu or cpu_name(), "cores": psutil.cpu_count(logical=False), "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "twinweight": twinweight.__version__,
        "model": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch."), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            lines = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int) -> tuple[float, list[float]]:
    clock = _Clock(model.device)
    if model.device.type != "cpu":
        torch.get_device_module(model.device.type).synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, streamer=clock
        )
    return start, clock.at


def _summary(model: PreTrainedModel, arm: _Arm, prompt: int, *, on: bool) -> dict[str, Any]:
    linears = int4_linears(model).values()
    twins = sum(linear.twin is not None for linear in linears) if on else 0
    held = twin_bytes(model) if on else 0
    budget = state_of(model).plan.budget
    kv = max(0, budget.spendable - held)
    speed = Timing.of([prompt / s for s in arm.ttft])
    tpot = Timing.of(arm.tpot).scaled(1e3) if arm.tpot else None
    return {
        "ttft_ms": Timing.of(arm.ttft).scaled(1e3), "prefill_tok_s": speed.scaled(1), "tpot_ms": tpot,
        "e2e_ms": Timing.of(arm.e2e).scaled(1e3), "kv_cache_gib": round(kv / GIB, 3),
        "kv_cache_tokens": kv // max(1, kv_bytes_per_token(model.config, model.dtype)), "twin_gib": round(held / GIB, 4),
        "twins": twins, "weights": len(linears),
    }  # fmt: skip


def _half(arm: _Arm, start: int) -> _Arm:
    return _Arm(arm.ttft[start::2], arm.tpot[start::2], arm.e2e[start::2])


def _ratios(off: _Arm, on: _Arm) -> dict[str, float]:
    """Ratios of medians: off / on for ttft and e2e, on / off for tpot."""

    def over(a: list[float], b: list[float]) -> float:
        return round(Timing.of(a).median / Timing.of(b).median, 4)

    ratios = {"ttft": over(off.ttft, on.ttft), "e2e": over(off.e2e, on.e2e)}
    if off.tpot and on.tpot:
        ratios["tpot"] = over(on.tpot, off.tpot)
    return ratios
