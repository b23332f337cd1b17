"""One arm of a benchmark: a server in this process, measured by vLLM's own request metrics. Needs vLLM.

`python -m twinweight.engines.vllm.arm JOB.json OUT.json` runs it alone, so that no memory and no compiled graph is shared.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from twinweight.engines.vllm.config import resolve
from twinweight.errors import TwinweightError

PLUGIN = {"group": "vllm.general_plugins", "name": "twinweight"}
"""What vLLM looks for when it starts."""

_WARM = 8  # requests of a warm-up: their chunks are as large as those of more
_MOST = 25  # repeats of a short point

DETERMINISTIC = "TORCHINDUCTOR_DETERMINISTIC"
"""The variable with which Inductor takes the same kernels each time."""

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no transfer between processes in the times
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `inner_kernel` travels to the workers
    # Inductor times candidates for the kernels between linears while it compiles: servers alike would differ by a percent.
    DETERMINISTIC: "1",
}
"""What a measured server finds in its environment, unless that says otherwise."""

TIMES = ("ttft_s", "tpot_s", "itl_s")
"""What is measured of a batch of requests."""

STEP = "twinweight-step "
"""What a line of progress starts with."""


@dataclass(frozen=True)
class Workload:
    """points: (prompt tokens, requests sent at once), in the order to measure; output_tokens a request; repeats a point, and
    more of short ones, until they took `seconds` together.
    """

    points: tuple[tuple[int, int], ...]
    output_tokens: int = 32
    repeats: int = 3
    seconds: float = 1.0


@dataclass(frozen=True)
class Job:
    """A server and what to ask of it. llm: arguments of vllm.LLM. random_integers: fill what dummy loading leaves unset."""

    llm: dict[str, Any]
    work: Workload
    random_integers: bool = False


def run(
    job: Job, step: Callable[[str], None] | None = None, done: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Start the server and measure every point.

    Returns {"startup_s", "kv_tokens", "inner_kernel", "twinweight" (the plugin's report, or None), "points": [{"prompt_tokens",
    "concurrency", "ttft_s", "tpot_s", "itl_s"}]}; the times are lists, one for each repeat (`requests`). `done` is given what
    there is after every point. Raises TwinweightError where twins are asked for and the plugin is not installed.
    """
    if resolve(job.llm.get("additional_config", {}), os.environ).mode != "off" and not entry_points(**PLUGIN):
        raise TwinweightError(
            "vLLM would not find the plugin: install twinweight (pip install .), its source alone is not enough"
        )
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import vllm

    if job.random_integers:
        fill_integers()
    started = time.monotonic()
    llm = vllm.LLM(skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=False, seed=0, **job.llm)
    startup = time.monotonic() - started
    config = llm.llm_engine.vllm_config
    result: dict[str, Any] = {
        "startup_s": startup, "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "inner_kernel": llm.apply_model(inner_kernel)[0], "twinweight": _report(llm, config), "vllm": vllm.__version__,
        "points": [],
    }  # fmt: skip
    vocabulary = config.model_config.get_vocab_size()
    warm: set[tuple[int, int]] = set()
    for prompt, batch in job.work.points:
        if step is not None:
            step(f"{prompt} tokens, {batch} at once")
        first = prompt, min(batch, _WARM)
        if first not in warm:
            requests(llm, *first, vocabulary, 2, seed=0)
            warm.add(first)
        samples: list[tuple[float, ...]] = []
        began = time.monotonic()
        while len(samples) < job.work.repeats or (len(samples) < _MOST and time.monotonic() - began < job.work.seconds):
            samples.append(requests(llm, prompt, batch, vocabulary, job.work.output_tokens, seed=1 + len(samples)))
        times = {name: [s[i] for s in samples] for i, name in enumerate(TIMES)}
        result["points"].append({"prompt_tokens": prompt, "concurrency": batch, **times})
        if done is not None:
            done(result)
    return result


def requests(llm: Any, prompt: int, batch: int, vocabulary: int, output_tokens: int, seed: int) -> tuple[float, float, float]:
    """`TIMES` of one batch of requests, in seconds: means over them to the first token, and for each that follows; and the
    latter of the request whose first token came last, behind which there is no prompt left to be prefilled.

    Not medians: where half of a batch fits into the chunks before the last, one request more or less moves a median by a
    chunk (TTFT -25 %, TPOT twice as long, for the same total). Means move as well, where first tokens come sooner and the next
    ones wait for the prompts behind them; the third says what decode alone takes.
    """
    import torch
    from vllm import SamplingParams

    # The upper quarter of a vocabulary holds special tokens.
    ids = torch.randint(0, vocabulary * 3 // 4, (batch, prompt), generator=torch.Generator().manual_seed(seed)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    found = [out.metrics for out in llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)]
    tpot = [(m.last_token_ts - m.first_token_ts) / (output_tokens - 1) for m in found]
    last = max(range(batch), key=lambda i: found[i].first_token_ts)
    return statistics.fmean(m.first_token_latency for m in found), statistics.fmean(tpot), tpot[last]


def inner_kernel(model: Any) -> str:
    """The names of the mixed-precision kernels in use; with the plugin, those it wraps. Importable, as workers unpickle it."""
    names = set()
    for module in model.modules():
        kernels = (getattr(getattr(module, owner, None), "kernel", None) for owner in ("scheme", "quant_method"))
        names |= {type(getattr(k, "inner", k)).__name__ for k in kernels if k is not None}
    return ",".join(sorted(names)) or "none"


def fill_integers() -> None:
    """Make the dummy loader fill int32 parameters with random bits: it leaves them unset, and zeros run faster."""
    import torch
    import vllm.model_executor.model_loader.dummy_loader as loader

    original = loader.initialize_dummy_weights
    seen: set[int] = set()

    def fill(module: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        original(module, model_config, *args, **kwargs)
        for parameter in module.parameters():
            if parameter.dtype == torch.int32 and parameter.numel() > 16 and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.data.random_(-(2**31), 2**31 - 1)

    loader.initialize_dummy_weights = fill


def _report(llm: Any, config: Any) -> Any:
    """None in mode off, where no worker has the method."""
    on = resolve(config.additional_config, os.environ).mode != "off"
    return json.loads(llm.collective_rpc("twinweight_report")[0]) if on else None


def main() -> None:
    """See the module."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work = given["work"]
    job = Job(**{**given, "work": Workload(**{**work, "points": tuple((p, c) for p, c in work["points"])})})
    result = run(job, step=lambda text: print(STEP + text, flush=True))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def as_json(job: Job) -> str:
    """The inverse of what `main` reads."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
