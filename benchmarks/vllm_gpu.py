"""One model in one mode through vLLM on GPUs: TTFT and TPOT by prompt length and concurrency, KV tokens, start-up time.

    python benchmarks/vllm_gpu.py OUT.json --model llama-3.1-8b --mode off|on|bf16 [--linear-backend machete] [--tp 2]

Weightless (`load_format="dummy"`) models of true size; the integer weights are filled with random bits, since zeros run
faster. Adds its records to OUT.json: {"environment", "records": [{"model", "mode", "inner_kernel", "tp", "prompt_tokens",
"concurrency", "ttft_ms", "tpot_ms", "itl_ms", "kv_tokens", "startup_s", ...}]}, after every point, as
`twinweight bench --engine vllm` does, whose code this is. Each (model, mode) is a process of its own, under 10 minutes.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinweight import presets
from twinweight.engines.vllm import arm, bench
from twinweight.synth_formats import Recipe, quantization_config

POINTS = [(prompt, at_once) for prompt in (512, 2048, 8192) for at_once in (1, 8, 32, 64, 128)]
OUTPUT_TOKENS = 64


def set_environment() -> None:
    """For a machine without a network and a vLLM without its optional kernels; what is set stays."""
    for name, value in (
        ("VLLM_USE_FLASHINFER_SAMPLER", "0"), ("VLLM_USE_DEEP_GEMM", "0"), ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"), ("VLLM_HOST_IP", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo"), ("NCCL_SOCKET_IFNAME", "lo"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)


def write_config(preset: str, out: Path, *, dense: bool, layers: int | None) -> None:
    """A directory with config.json alone."""
    config = presets.preset(preset, layers)
    if not dense:
        recipe = Recipe(format="compressed-tensors", group_size=128, symmetric=True, dtype="bfloat16")
        config["quantization_config"] = quantization_config(recipe, ["lm_head", "mlp.gate"])
    (out / "config.json").write_text(json.dumps(config))


@contextmanager
def weightless(model: str, backend: str, mode: str, **more: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, of a model without weights, in a mode of the plugin. more: arguments of it."""
    set_environment()
    for name, value in arm.DEFAULTS.items():
        os.environ.setdefault(name, value)
    import vllm

    arm.fill_integers()
    with tempfile.TemporaryDirectory() as tmp:
        write_config(model, Path(tmp), dense=False, layers=None)
        yield vllm.LLM(
            model=tmp, load_format="dummy", max_model_len=16384, attention_backend="FLASH_ATTN", skip_tokenizer_init=True,
            enable_prefix_caching=False, seed=0, linear_backend=backend, additional_config={"twinweight": {"mode": mode}},
            **more,
        )  # fmt: skip


def of_a_server(description: str | None) -> argparse.ArgumentParser:
    """Arguments of what looks into one server, off or on: out, model, mode and linear_backend."""
    cli = argparse.ArgumentParser(description=description)
    cli.add_argument("out", type=Path)
    cli.add_argument("--model", default="llama-3.1-8b")
    cli.add_argument("--mode", choices=("off", "on"), required=True)
    cli.add_argument("--linear-backend", default="auto")
    return cli


def point(text: str) -> tuple[int, int]:
    """(prompt tokens, requests at once) of "2048x32"."""
    prompt, requests = text.split("x")
    return int(prompt), int(requests)


def arguments() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("out", type=Path)
    cli.add_argument("--model", default="llama-3.1-8b")
    cli.add_argument("--layers", type=int)
    cli.add_argument("--mode", choices=("off", "on", "bf16"), required=True)
    cli.add_argument("--twin-dtype", default="dense", help="dense, fp8, fp8-exact or fp8-row; write each to a file of its own")
    cli.add_argument("--linear-backend", default="auto")
    cli.add_argument("--tp", type=int, default=1)
    cli.add_argument("--repeats", type=int, default=3)
    cli.add_argument("--seconds", type=float, default=4.0, help="a point that took less is repeated further, 25 times at most")
    cli.add_argument("--max-model-len", type=int, default=16384)
    cli.add_argument("--points", type=point, nargs="+", default=POINTS, help="PROMPTxREQUESTS: 2048x32 8192x8; default: all 15")
    return cli


def main() -> None:
    a = arguments().parse_args()
    set_environment()
    work = arm.Workload(tuple(a.points), OUTPUT_TOKENS, a.repeats, a.seconds)
    earlier = json.loads(a.out.read_text())["records"] if a.out.exists() else []

    def save(result: dict[str, Any]) -> None:
        records = bench.records_of(a.model, a.mode, a.tp, [result])
        print(records[-1], flush=True)
        environment = {
            **bench.environment(result["vllm"]), "output_tokens": OUTPUT_TOKENS, "command": shlex.join(["python", *sys.argv])
        }  # fmt: skip
        a.out.write_text(json.dumps({"environment": environment, "records": earlier + records}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as tmp:
        write_config(a.model, Path(tmp), dense=a.mode == "bf16", layers=a.layers)
        llm: dict[str, Any] = {
            "model": tmp, "load_format": "dummy", "max_model_len": a.max_model_len, "tensor_parallel_size": a.tp,
            "attention_backend": "FLASH_ATTN",
        }  # fmt: skip
        if a.linear_backend != "auto":
            llm["linear_backend"] = a.linear_backend
        if a.mode == "on":
            llm["additional_config"] = {"twinweight": {"mode": "soft", "dtype": a.twin_dtype}}
        arm.run(arm.Job(llm, work, random_integers=True), done=save)


if __name__ == "__main__":
    main()
