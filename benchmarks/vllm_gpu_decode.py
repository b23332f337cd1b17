"""A server's decode steps, twins off and on, with nothing left to chance: what a step takes, and the kernels in it.

    python benchmarks/vllm_gpu_decode.py OUT.json --model qwen3-32b --mode off|on --linear-backend marlin

Two servers alike differ by a percent: Inductor times candidates for the kernels between the linears while it compiles and takes
one or another. This sets TORCHINDUCTOR_DETERMINISTIC=1, which takes the same ones each time. Adds to OUT.json: {"environment",
"records": [{"model", "mode", "inner_kernel", "concurrency", "step_ms": of five times 50 steps behind prompts of 512 tokens,
"kernels": in a step, "kernels_ms": their time, "int4_ms": of it in the int4 kernel}]}. Weightless models, as `vllm_gpu.py`.
"""

import json
import os
import shlex
import sys
import time
from typing import Any

from vllm_gpu import of_a_server, weightless

from twinweight.engines.vllm import arm, bench, compat

PROMPT, STEPS, SAMPLES, PROFILED = 512, 50, 5, 24
INT4 = ("marlin", "machete", "humming")  # what the names of these kernels have in them


def measure(llm: Any, concurrency: int) -> dict[str, Any]:
    """One record's figures: of decode alone, with `concurrency` requests in it."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=2 * STEPS * SAMPLES, ignore_eos=True, detokenize=False)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    ids = torch.randint(0, vocabulary // 2, (concurrency, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    names = [f"{concurrency}-{i}" for i in range(concurrency)]
    for name, prompt in zip(names, ids, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begun: set[str] = set()
    while len(begun) < concurrency:
        begun |= {out.request_id for out in engine.step()}
    for _ in range(20):
        engine.step()
    samples = []
    for _ in range(SAMPLES):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        samples.append(round((time.perf_counter() - started) / STEPS * 1e3, 4))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            engine.step()
    kernels = [e for e in recorded.events() if str(e.device_type).endswith("CUDA")]
    times = {e.name.lower(): 0.0 for e in kernels}
    for e in kernels:
        times[e.name.lower()] += e.time_range.elapsed_us() / PROFILED / 1e3
    engine.abort_request(names)
    for _ in range(3):
        engine.step()
    int4 = sum(ms for name, ms in times.items() if any(kernel in name and not name.startswith("triton") for kernel in INT4))
    return {
        "concurrency": concurrency, "step_ms": samples, "kernels": round(len(kernels) / PROFILED, 1),
        "kernels_ms": round(sum(times.values()), 4), "int4_ms": round(int4, 4),
    }  # fmt: skip


def main() -> None:
    cli = of_a_server(__doc__)
    cli.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    a = cli.parse_args()
    os.environ |= arm.DEFAULTS
    result = json.loads(a.out.read_text()) if a.out.exists() else {"records": []}
    with weightless(a.model, a.linear_backend, "soft" if a.mode == "on" else "off") as llm:
        head = {"model": a.model, "mode": a.mode, "inner_kernel": llm.apply_model(arm.inner_kernel)[0]}
        for concurrency in a.concurrency:
            result["records"].append({**head, **measure(llm, concurrency)})
            print(result["records"][-1], flush=True)
    result["environment"] = {**bench.environment(compat.version()), "command": shlex.join(["python", *sys.argv])}
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
