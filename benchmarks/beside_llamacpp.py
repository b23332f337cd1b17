"""vLLM with twins and llama.cpp on one CPU, request by request in turn: what neighbours leave of the memory changes within a
minute by half, so that two runs one after the other compare neighbours.

    python benchmarks/beside_llamacpp.py OUT.json MODEL --llama VENV/bin/python --vllm .venv-vllm/bin/python [--rounds 12]
        [--without "vLLM, twins in bf16"]

MODEL: the 8B shape cut to 2 layers (`twinweight synth MODEL --like llama-3.1-8b --layers 2`); VENV as in `llamacpp.py`, whose
weights and method these are. Starts all servers, then asks each of them once a round for 1024 tokens in and 32 out, in an
order that rotates; each takes up to 6 GB. Writes {"environment", "records": [{"engine", "prefill_s", "token_ms"}], each a
list by round, "ratios": {llama.cpp's head: {engine: {"prefill", "token"}}}, llama.cpp's time over the engine's and medians of
it}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT, TOKENS = 1024, 32
READY, ANSWER = "ready", "answer "
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
PEERS = {"llama.cpp, Q4_0, bf16 head": "BF16", "llama.cpp, Q4_0, Q6_K head": "Q6_K"}
SERVERS: dict[str, dict[str, str]] = {
    "vLLM, off": {}, "vLLM, twins in bf16": {"mode": "soft"}, "vLLM, twins in int8": {"mode": "soft", "dtype": "int8"},
    "vLLM, twins and head in int8": {"mode": "soft", "dtype": "int8", "head": "int8"},
}  # fmt: skip


class Engine:
    """A process that answers a request for every line that it reads."""

    def __init__(self, python: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, *args], env=os.environ | SETTINGS, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._until(READY)

    def ask(self) -> dict[str, Any]:
        """{"prefill_s", "token_ms"} of one request."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._until(ANSWER))
        return found

    def _until(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start)
        raise SystemExit(f"{self.process.args} ended")


def serve_llama(head: str, threads: int) -> None:
    """In the environment of llama.cpp."""
    import llamacpp

    config = llamacpp.presets.preset(llamacpp.PRESET, llamacpp.LAYERS)
    llamacpp.begin()
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "model.gguf"
        llamacpp.write(file, config, llamacpp.Type[head])
        model = llamacpp.Model(file, threads, PROMPT, TOKENS)
        model.request(0, config["vocab_size"])
        print(READY, flush=True)
        for seed, _ in enumerate(sys.stdin, 1):
            prefill, token = model.request(seed, config["vocab_size"])
            print(ANSWER + json.dumps({"prefill_s": prefill, "token_ms": token * 1e3}), flush=True)


def serve_vllm(name: str, model: str) -> None:
    """In the environment of vLLM."""
    from twinweight.engines.vllm import arm

    llm: dict[str, Any] = {"model": model, "max_model_len": 2048}
    if SERVERS[name]:
        llm["additional_config"] = {"twinweight": SERVERS[name]}
    seen = 0

    def wait(_: str) -> None:
        if seen == 2:
            print(READY, flush=True)
        if seen >= 2 and not sys.stdin.readline():
            raise SystemExit

    def tell(result: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen > 2:
            point = result["points"][-1]
            print(ANSWER + json.dumps({"prefill_s": point["ttft_s"][0], "token_ms": point["tpot_s"][0] * 1e3}), flush=True)

    endless = ((PROMPT, 1),) * 10_000
    arm.run(arm.Job(llm, arm.Workload(endless, TOKENS, repeats=1, seconds=0.0)), step=wait, done=tell)


def by_round(a: list[float], b: list[float]) -> float:
    """The median of a over b, of one round each."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    if sys.argv[1] == "--serve":
        name, given = sys.argv[2:]
        serve_llama(PEERS[name], int(given)) if name in PEERS else serve_vllm(name, given)
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("model", type=Path)
    p.add_argument("--llama", required=True)
    p.add_argument("--vllm", required=True)
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--without", nargs="*", default=[], choices=[*PEERS, *SERVERS])
    a = p.parse_args()
    engines = {name: Engine(a.llama, "--serve", name, str(a.threads)) for name in PEERS if name not in a.without}
    engines |= {name: Engine(a.vllm, "--serve", name, str(a.model)) for name in SERVERS if name not in a.without}
    names, found = list(engines), {name: [] for name in engines}
    for turn in range(a.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(engines[name].ask())
        print({name: {k: round(v, 3) for k, v in asked[-1].items()} for name, asked in found.items()}, flush=True)
    for engine in engines.values():
        engine.process.kill()
    times = {name: {key: [x[key] for x in asked] for key in ("prefill_s", "token_ms")} for name, asked in found.items()}
    ratios = {
        PEERS[peer]: {
            name: {key.partition("_")[0]: round(by_round(times[peer][key], times[name][key]), 3) for key in times[name]}
            for name in times
            if name in SERVERS
        }
        for peer in times
        if peer in PEERS
    }
    environment = {
        "cores": os.cpu_count(), "threads": a.threads, "date": time.strftime("%Y-%m-%d"),
        "prompt_tokens": PROMPT, "output_tokens": TOKENS,
        "command": f"python benchmarks/beside_llamacpp.py OUT.json MODEL --llama PYTHON --vllm PYTHON --rounds {a.rounds}"
        + "".join(f' --without "{name}"' for name in a.without),
    }  # fmt: skip
    records = [{"engine": name, **{k: [round(x, 4) for x in v] for k, v in t.items()}} for name, t in times.items()]
    a.out.write_text(json.dumps({"environment": environment, "records": records, "ratios": ratios}, indent=1) + "\n")
    print(ratios)


if __name__ == "__main__":
    main()
