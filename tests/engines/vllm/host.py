"""Runs servers one after another in one process, so that vLLM is imported once. Not a test by itself.

Reads a job as a line of JSON, writes a line `RESULT <JSON>`. A job: llm (arguments of LLM), tokens, prompts (token lists),
batches (lists of indices into prompts, generated at once), reload (model directories, each loaded in place and followed by the
batches again), adapter (a LoRA directory for every request, or null). A result: ids and leads (for each batch and prompt, the
tokens and how far each led), reports (of every rank, before the first and after every batch; none without twins), or error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from twinweight import paths

    paths.calls.clear()
    with_ray = job["llm"].get("distributed_executor_backend") == "ray"
    if with_ray:
        import ray

        here = {"address": "local", "num_gpus": 2, "num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
        ray.init(**({} if "RAY_ADDRESS" in os.environ else here))
    llm = LLM(seed=0, enable_prefix_caching=False, disable_log_stats=True, skip_tokenizer_init=True, **job["llm"])
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, logprobs=2)
    prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    on = job["llm"]["additional_config"].get("twinweight", {}).get("mode", "off") != "off"

    found: dict[str, list[Any]] = {"ids": [], "leads": [], "reports": [report(llm, on)]}
    try:
        for directory in (None, *job["reload"]):
            if directory is not None:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
            for batch in job["batches"]:
                outputs = llm.generate([prompts[i] for i in batch], sampling, use_tqdm=False, lora_request=adapter)
                found["ids"].append([list(o.outputs[0].token_ids) for o in outputs])
                found["leads"].append([[lead(top) for top in o.outputs[0].logprobs] for o in outputs])
                found["reports"].append(report(llm, on))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if with_ray:
            ray.shutdown()
    return found


def report(llm: Any, on: bool) -> list[Any]:
    return [json.loads(t) for t in llm.collective_rpc("twinweight_report", kwargs={"check": True})] if on else []


def lead(top: dict[int, Any]) -> float:
    """By how much the best logit leads."""
    best = sorted((t.logprob for t in top.values()), reverse=True)
    return float(best[0] - best[1])


def main() -> None:
    for line in sys.stdin:
        try:
            result = run(json.loads(line))
        except Exception:
            result = {"error": traceback.format_exc()}
        sys.stderr.flush()
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
