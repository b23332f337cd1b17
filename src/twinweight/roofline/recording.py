"""`profile --engine hf`: traces of the embedded engine, off and on, one prompt and some decode steps each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from twinweight.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARMS = ("off", "on")


@dataclass(frozen=True)
class Recipe:
    """What is recorded: `batch` prompts of random ids at once, `output_tokens` - 1 decode steps after them."""

    prompt_tokens: int = 512
    output_tokens: int = 8
    batch: int = 1


def record(model: PreTrainedModel, recipe: Recipe, out: Path, step: Callable[[str], None] | None = None) -> dict[str, Path]:
    """Write out/off.json.gz and out/on.json.gz, with shapes and with labels where prefill and each decode step begin.

    Returns the file of each arm. Raises ConfigError where `out` cannot be written, and what `bench.check_room` raises.
    """
    from twinweight.bench import Workload, check_room, make_inputs
    from twinweight.twins import twins_in_use

    work = Workload(recipe.prompt_tokens, recipe.output_tokens, recipe.batch)
    check_room(model, work)
    written = {}
    for arm in ARMS:
        if step is not None:
            step(arm)
        with twins_in_use(model, arm == "on"), torch.inference_mode():
            generate: Any = model.generate
            tokens = {"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False}
            generate(**make_inputs(model, work, seed=0), **tokens)  # kernels compile and caches fill outside of the trace
            inputs = make_inputs(model, work, seed=1)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if model.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities, record_shapes=True) as profiler, _labelled(model):
                generate(**inputs, min_new_tokens=work.output_tokens, max_new_tokens=work.output_tokens, do_sample=False)
                if model.device.type != "cpu":
                    torch.get_device_module(model.device.type).synchronize()
        written[arm] = _write(profiler, out / f"{arm}.json.gz")
    return written


@contextmanager
def _labelled(model: PreTrainedModel) -> Iterator[None]:
    """Label the forward passes: the first is prefill, the others decode."""
    labels: list[Any] = []

    def begin(*_: Any) -> None:
        labels.append(torch.profiler.record_function("twinweight::decode" if labels else "twinweight::prefill"))
        labels[-1].__enter__()

    def end(*_: Any) -> None:
        labels[-1].__exit__(None, None, None)

    hooks = (model.register_forward_pre_hook(begin), model.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _write(profiler: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return path
