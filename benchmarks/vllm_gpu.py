"""One model in one mode through vLLM on GPUs: TTFT and TPOT by prompt length and concurrency, KV tokens, start-up time.

    python benchmarks/vllm_gpu.py OUT.json --model llama-3.1-8b --mode off|on|bf16 [--linear-backend machete] [--tp 2]

Weightless (`load_format="dummy"`) models of true size; the integer weights are filled with random bits, since zeros run
faster. Adds its records to OUT.json: {"environment", "records": [{"model", "mode", "inner_kernel", "tp", "prompt_tokens",
"concurrency", "ttft_ms", "tpot_ms", "kv_tokens", "startup_s"}]}. Times come from vLLM's own request metrics: medians over
requests and repeats. Each (model, mode) is a process of its own, under 10 minutes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

GRID = {512: (1, 8, 32, 64, 128), 2048: (1, 8, 32, 64, 128), 8192: (1, 8)}
OUTPUT_TOKENS = 64


def write_config(preset: str, out: Path, *, dense: bool, layers: int | None) -> None:
    """A directory with config.json alone."""
    from twinweight import presets
    from twinweight.synth_formats import Recipe, quantization_config

    config = presets.preset(preset, layers)
    if not dense:
        recipe = Recipe(format="compressed-tensors", group_size=128, symmetric=True, dtype="bfloat16")
        config["quantization_config"] = quantization_config(recipe, ["lm_head", "mlp.gate"])
    (out / "config.json").write_text(json.dumps(config))


def fill_integers() -> None:
    """Make the dummy loader fill int32 parameters with random bits; it leaves them unset."""
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


def run(llm: Any, prompt: int, batch: int, vocab: int, output_tokens: int) -> list[tuple[float, float]]:
    """(TTFT, TPOT) in seconds of each request of one batch."""
    import torch
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": torch.randint(0, vocab, (prompt,)).tolist()} for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    found = []
    for out in llm.generate(prompts, params, use_tqdm=False):
        m = out.metrics
        found.append((m.first_token_latency, (m.last_token_ts - m.first_token_ts) / (output_tokens - 1)))
    return found


def inner_kernel(model: Any) -> str:
    """The names of the mixed-precision kernels in use; with the plugin, those that it wraps. Importable: workers pickle it."""
    names = set()
    for module in model.modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        if kernel is not None:
            names.add(type(getattr(kernel, "inner", kernel)).__name__)
    return ",".join(sorted(names)) or "none"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--model", default="llama-3.1-8b")
    p.add_argument("--layers", type=int)
    p.add_argument("--mode", choices=("off", "on", "bf16"), required=True)
    p.add_argument("--linear-backend", default="auto")
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--max-model-len", type=int, default=16384)
    p.add_argument("--quick", action="store_true", help="concurrency 1 and 32 only")
    a = p.parse_args()
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_USE_FLASHINFER_SAMPLER", "0"), ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"), ("VLLM_USE_DEEP_GEMM", "0"), ("VLLM_HOST_IP", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo"),
        ("NCCL_SOCKET_IFNAME", "lo"), ("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)

    import torch
    import vllm

    fill_integers()
    with tempfile.TemporaryDirectory() as tmp:
        write_config(a.model, Path(tmp), dense=a.mode == "bf16", layers=a.layers)
        options: dict[str, Any] = {"attention_backend": "FLASH_ATTN"}
        if a.linear_backend != "auto":
            options["linear_backend"] = a.linear_backend
        if a.mode == "on":
            options["additional_config"] = {"twinweight": {"mode": "soft"}}
        started = time.monotonic()
        llm = vllm.LLM(
            model=tmp, load_format="dummy", skip_tokenizer_init=True, max_model_len=a.max_model_len, tensor_parallel_size=a.tp,
            enable_prefix_caching=False, disable_log_stats=False, seed=0, **options,
        )  # fmt: skip
        startup = time.monotonic() - started
    config = llm.llm_engine.vllm_config
    kernels = llm.apply_model(inner_kernel)[0]
    kv_tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    vocab = config.model_config.get_vocab_size()
    done = json.loads(a.out.read_text()) if a.out.exists() else {"environment": {}, "records": []}
    done["environment"] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "vllm": vllm.__version__,
        "date": time.strftime("%Y-%m-%d"), "output_tokens": OUTPUT_TOKENS, "command": "python benchmarks/vllm_gpu.py ...",
    }  # fmt: skip
    for prompt, batches in GRID.items():
        run(llm, prompt, 1, vocab, 4)
        for batch in batches:
            if a.quick and batch not in (1, 32):
                continue
            repeats = max(5, a.repeats) if batch == 1 else a.repeats if batch <= 8 else 1
            samples = [s for _ in range(repeats) for s in run(llm, prompt, batch, vocab, OUTPUT_TOKENS)]
            record = {
                "model": a.model, "mode": a.mode, "inner_kernel": kernels, "tp": a.tp, "prompt_tokens": prompt,
                "concurrency": batch, "ttft_ms": round(statistics.median(s[0] for s in samples) * 1e3, 3),
                "tpot_ms": round(statistics.median(s[1] for s in samples) * 1e3, 4), "kv_tokens": kv_tokens,
                "startup_s": round(startup, 1),
            }  # fmt: skip
            print(record, flush=True)
            done["records"].append(record)
            a.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
