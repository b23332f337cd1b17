"""Single prompts by what came before them: behind a request with a decode, behind one without, behind a rest.

    python benchmarks/vllm_gpu_single.py OUT.json --model llama-3.3-70b --mode off|on --linear-backend machete --prompts 2048

At the GPU's power limit a prefill takes as long as its energy does, and what was spent just before counts: a faster decode
leaves it less. Adds to OUT.json: {"environment", "records": [{"model", "mode", "prompt_tokens", "output_tokens", "rest_s",
"ttft_ms": of each request, "sm_mhz" and "watts": means while prompts were prefilled, "decode_watts"}]}, each block twice.
Weightless models, as `vllm_gpu.py`.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from vllm_gpu import of_a_server, weightless

from twinweight.engines.vllm import arm, bench, compat

BLOCKS = [(64, 0.0), (2, 0.0), (64, 1.0)]  # tokens that follow each prompt, seconds before the next
REQUESTS, SKIPPED = 6, 1  # of a block; those at its start, which come behind another block's


class Sensors:
    """Clocks and power of the GPU every 20 ms, as (seconds since the epoch, MHz, W)."""

    def __init__(self) -> None:
        command = "nvidia-smi --query-gpu=clocks.sm,power.draw.instant --format=csv,noheader,nounits -lms 20 -i 0"
        self.process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, text=True)
        self.samples: list[tuple[float, float, float]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            mhz, watts = line.split(",")
            self.samples.append((time.time(), float(mhz), float(watts)))

    def between(self, begin: float, end: float) -> list[tuple[float, float, float]]:
        """Samples of a span of time."""
        return [s for s in self.samples if begin <= s[0] <= end]


def block(llm: Any, sensors: Sensors, prompt: int, output_tokens: int, rest_s: float) -> dict[str, Any]:
    """One record's figures."""
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    found: dict[str, list[float]] = {"ttft_ms": [], "sm_mhz": [], "watts": [], "decode_watts": []}
    for i in range(REQUESTS):
        time.sleep(rest_s)
        ttft, tpot, _ = arm.requests(llm, prompt, 1, vocabulary, output_tokens, seed=i)
        if i < SKIPPED:
            continue
        end = time.time() - tpot * (output_tokens - 1)
        prefill = sensors.between(end - ttft, end)
        found["ttft_ms"].append(round(ttft * 1e3, 2))
        found["sm_mhz"] += [s[1] for s in prefill]
        found["watts"] += [s[2] for s in prefill]
        found["decode_watts"] += [s[2] for s in sensors.between(end, time.time())]
    means = {name: round(statistics.fmean(v)) for name, v in found.items() if name != "ttft_ms" and v}
    return {"prompt_tokens": prompt, "output_tokens": output_tokens, "rest_s": rest_s, "ttft_ms": found["ttft_ms"], **means}


def main() -> None:
    cli = of_a_server(__doc__)
    cli.add_argument("--prompts", type=int, nargs="+", default=[2048])
    a = cli.parse_args()
    os.environ |= arm.DEFAULTS
    result = json.loads(a.out.read_text()) if a.out.exists() else {"records": []}
    with weightless(a.model, a.linear_backend, "soft" if a.mode == "on" else "off", disable_log_stats=False) as llm:
        result["environment"] = {**bench.environment(compat.version()), "command": shlex.join(["python", *sys.argv])}
        sensors = Sensors()
        for prompt in a.prompts:
            arm.requests(llm, prompt, 1, 1000, 2, seed=0)
            for output_tokens, rest_s in BLOCKS * 2:
                record = {"model": a.model, "mode": a.mode, **block(llm, sensors, prompt, output_tokens, rest_s)}
                print(record, flush=True)
                result["records"].append(record)
                a.out.write_text(json.dumps(result, indent=1) + "\n")
        sensors.process.kill()


if __name__ == "__main__":
    main()
