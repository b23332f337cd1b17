"""One vLLM run in a process of its own: `python serve_once.py '<JSON>'` prints a line `RESULT <JSON>`. Not a test by itself.

In: model, llm (arguments of LLM), tokens, prompts (texts or token lists), batches (lists of indices into prompts, generated at
once), reload (model directories, each loaded in place and followed by the batches again), plugin (whether twins are on).
Out: ids (a list of token lists for each batch), reports (of every rank, before the first and after every batch).
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], seed=0, enable_prefix_caching=False, disable_log_stats=True, **job["llm"])
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt": p} if isinstance(p, str) else {"prompt_token_ids": p} for p in job["prompts"]]

    def report() -> list[Any]:
        if not job["plugin"]:
            return []
        return [json.loads(text) for text in llm.collective_rpc("twinweight_report", kwargs={"check": True})]

    ids, reports = [], [report()]
    for directory in (None, *job["reload"]):
        if directory is not None:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        for batch in job["batches"]:
            outputs = llm.generate([prompts[i] for i in batch], sampling, use_tqdm=False)
            ids.append([list(o.outputs[0].token_ids) for o in outputs])
            reports.append(report())
    return {"ids": ids, "reports": reports}


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
