"""One server whose routes of full steps are exchanged while it runs: what each path does to steps, and to first tokens.

    python benchmarks/vllm_gpu_routes.py OUT.json [--model qwen3-32b] [--linear-backend machete] [--variants planned inner]

Prompts of 8192 tokens, four at once, in steps of 16384; from there on the linears of one kind take another path than vLLM's
kernel, which the others have. Variants run in turn and back again. Writes {"environment", "records": [{"round", "variant",
"total_s": until the last of two tokens each, "ttft_s": the mean, "first_tokens_s": of each request}]}. Weightless models, as
`vllm_gpu.py`.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_gpu import weightless

from twinweight.engines.vllm import bench, compat
from twinweight.paths import Path as Way

PROMPT, AT_ONCE, TOKENS = 8192, 4, 2
FULL = 4096  # rows from which on the path is exchanged
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
VARIANTS: dict[str, dict[str, Way]] = {
    "inner": {},
    "qkv stream": {"qkv_proj": Way.STREAM},
    "gate_up stream": {"gate_up_proj": Way.STREAM},
    "qkv fused": {"qkv_proj": Way.FUSED},
    "down fused": {"down_proj": Way.FUSED},
    "gate_up fused": {"gate_up_proj": Way.FUSED},
    "qkv and gate_up fused": {"qkv_proj": Way.FUSED, "gate_up_proj": Way.FUSED},
}
"""The kinds of linears that take another path; beside them the routes as they were planned."""

Routes = dict[str, list[int]]


def routes(model: Any) -> Routes:
    """Of all layers, by name."""
    from twinweight.engines.vllm.kernel import kernels_of

    return {name: list(kernel.route) for name, kernel in kernels_of(model).items()}


def exchange(flats: Routes, model: Any) -> None:
    """Give all layers these routes."""
    from twinweight.engines.vllm.kernel import kernels_of

    for name, kernel in kernels_of(model).items():
        kernel.route = flats[name]


def replaced(planned: Routes, ways: dict[str, Way]) -> Routes:
    """The planned routes below FULL rows, and from there on these ways, or vLLM's kernel."""
    found = {}
    for name, flat in planned.items():
        way = ways.get(next(kind for kind in LINEARS if kind in name), Way.INNER)
        kept = [v for pair in zip(flat[::2], flat[1::2], strict=True) if pair[0] < FULL for v in pair]
        found[name] = kept if kept[-1] == way else [*kept, FULL, int(way)]
    return found


def prefill(llm: Any, seed: int) -> dict[str, Any]:
    """One record's figures."""
    import torch
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary // 2, (AT_ONCE, PROMPT), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    out = llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
    total, first = time.perf_counter() - began, [o.metrics.first_token_latency for o in out]
    return {
        "total_s": round(total, 4), "ttft_s": round(statistics.fmean(first), 4),
        "first_tokens_s": sorted(round(s, 3) for s in first),
    }  # fmt: skip


def measure(llm: Any, rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """The records."""
    planned: Routes = llm.apply_model(routes)[0]
    variants = {name: replaced(planned, VARIANTS[name]) if name in VARIANTS else planned for name in names}
    records = []
    prefill(llm, 0)
    for at in range(rounds):
        for name in list(variants)[:: -1 if at % 2 else 1]:
            change: Callable[[Any], None] = partial(exchange, variants[name])
            llm.apply_model(change)
            records.append({"round": at, "variant": name, **prefill(llm, 1 + at)})
            print(records[-1], flush=True)
    return records


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("out", type=Path)
    cli.add_argument("--model", default="qwen3-32b")
    cli.add_argument("--linear-backend", default="machete")
    cli.add_argument("--rounds", type=int, default=4)
    cli.add_argument("--variants", nargs="+", choices=("planned", *VARIANTS), default=["planned", *VARIANTS])
    a = cli.parse_args()
    with weightless(a.model, a.linear_backend, "soft", disable_log_stats=False) as llm:
        records = measure(llm, a.rounds, a.variants)
    environment = {**bench.environment(compat.version()), "model": a.model, "command": shlex.join(["python", *sys.argv])}
    a.out.write_text(json.dumps({"environment": environment, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
