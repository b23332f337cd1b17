"""`profile --engine vllm`: traces of a vLLM server, off and on, each in processes of its own, by vLLM's own profiler.

`python -m twinweight.engines.vllm.record JOB.json` records one. The profiler starts after a warm-up request, so that start-up,
compilation and capture stay out of the trace. Steps carry vLLM's detailed labels, from which the work of attention follows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinweight.engines.vllm.config import KEY
from twinweight.errors import ConfigError, TwinweightError
from twinweight.roofline.recording import ARMS, Recipe
from twinweight.roofline.run import REFERENCE


def record(
    model: Path,
    recipe: Recipe,
    out: Path,
    *,
    settings: dict[str, Any],
    engine_args: dict[str, Any],
    references: bool,
    step: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Write out/off.json.gz and out/on.json.gz, or a directory each where there are several ranks.

    settings: of the plugin, for on. engine_args: arguments of vllm.LLM. references: also record both without CUDA graphs
    (off.eager.json.gz, ...), from which `roofline` knows the ops of replayed kernels. Returns the file of each arm. Raises
    TwinweightError, with its last lines, where a server fails; ConfigError where vLLM is missing or `out` cannot be written.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"--engine vllm needs vLLM, which {sys.executable} does not have")
    longest = -(-(recipe.prompt_tokens + recipe.output_tokens) // 256) * 256
    llm = {"model": str(model), "max_model_len": longest, **engine_args}
    given = dict(llm.pop("additional_config", {}))
    settings = {**given.pop(KEY, {}), **settings}
    written = {}
    for arm in ARMS:
        own = llm | {"additional_config": {**given, KEY: settings} if arm == "on" else given}
        written[arm] = _one(own, recipe, out, arm, step)
        if references and not llm.get("enforce_eager"):
            _one(own | {"enforce_eager": True}, recipe, out, arm + REFERENCE, step)
    return written


def _one(llm: dict[str, Any], recipe: Recipe, out: Path, name: str, step: Callable[[str], None] | None) -> Path:
    if step is not None:
        step(name)
    with tempfile.TemporaryDirectory() as tmp:
        job = Path(tmp) / "job.json"
        job.write_text(json.dumps({"llm": llm, "recipe": asdict(recipe), "traces": f"{tmp}/traces"}), encoding="utf-8")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("TWINWEIGHT_", "VLLM_W4A16_PREFILL_BF16"))}
        done = subprocess.run(
            [sys.executable, "-m", "twinweight.engines.vllm.record", str(job)],
            env=environ, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        traces = sorted(Path(tmp, "traces").glob("*.json*"))
        if done.returncode or not traces:
            last = "\n".join(done.stdout.splitlines()[-25:])
            raise TwinweightError(f"vLLM ended with code {done.returncode} and {len(traces)} traces; its last lines:\n{last}")
        return _keep(traces, out, name)


def _keep(traces: list[Path], out: Path, name: str) -> Path:
    suffix = ".json.gz" if traces[0].name.endswith(".gz") else ".json"
    try:
        target = out / name if len(traces) > 1 else out / f"{name}{suffix}"
        (target if len(traces) > 1 else out).mkdir(parents=True, exist_ok=True)
        for rank, trace in enumerate(traces):
            shutil.move(trace, target / f"rank{rank}{suffix}" if len(traces) > 1 else target)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    return target


def main() -> None:
    """See the module."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    import vllm

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recipe = Recipe(**job["recipe"])
    profiler = {
        "profiler": "torch", "torch_profiler_dir": job["traces"], "torch_profiler_record_shapes": True,
        "torch_profiler_with_stack": False, "torch_profiler_dump_cuda_time_total": False, "detailed_trace_annotation": True,
    }  # fmt: skip
    llm = vllm.LLM(
        skip_tokenizer_init=True, enable_prefix_caching=False, seed=0, profiler_config=profiler, **job["llm"]
    )  # fmt: skip
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def send(tokens: int, seed: int) -> None:
        # The upper quarter of a vocabulary holds special tokens.
        size, generator = (recipe.batch, recipe.prompt_tokens), torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocabulary * 3 // 4, size, generator=generator).tolist()
        params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)

    send(2, seed=0)
    llm.start_profile()
    send(recipe.output_tokens, seed=1)
    llm.stop_profile()


if __name__ == "__main__":
    main()
