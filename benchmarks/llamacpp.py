"""What llama.cpp does on this CPU with the 8B shape cut to 2 layers: prefill of 1024 tokens, then decode. Our peer there.

    python -m venv VENV; CMAKE_ARGS=-DGGML_NATIVE=ON VENV/bin/pip install gguf llama-cpp-python
    VENV/bin/python benchmarks/llamacpp.py OUT.json [--threads 2] [--repeats 7]

Weights are random, of true shape and format: the layers Q4_0; the output head once as bf16, as in our checkpoint, and once
Q6_K, as `llama-quantize` leaves it in a Q4_0 file. Needs neither torch nor the rest of Twinweight.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from twinweight import presets

PRESET, LAYERS = "llama-3.1-8b", 2
Type = gguf.GGMLQuantizationType
Random = np.random.Generator


def blocks(random: Random, n: int, k: int, kind: Type) -> np.ndarray:
    """Random blocks of a kind, for [n, k]: any nibbles, half-precision scales such that weights are of order 1 / sqrt(k)."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (n, k // count, size), dtype=np.uint8)
    at, step = {Type.Q4_0: (0, 5), Type.Q6_K: (208, 20 * 64)}[kind]  # where the block's scale stands; typical size of a value
    data[:, :, at : at + 2] = np.frombuffer(np.float16(1 / (step * k**0.5)).tobytes(), np.uint8)
    return data.reshape(n, -1)


def bf16(random: Random, n: int, k: int) -> np.ndarray:
    """Random bf16 values as raw bytes."""
    values = random.standard_normal((n, k), dtype=np.float32) / np.float32(k**0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def write(path: Path, config: dict, head: Type) -> None:
    """A GGUF file of the config's shape, without a vocabulary."""
    random = np.random.default_rng(0)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_vocab_size(vocab)
    out.add_context_length(8192)
    out.add_embedding_length(hidden)
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(inner)
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_tokenizer_model("no_vocab")
    ones = np.ones(hidden, np.float32)
    out.add_tensor("token_embd.weight", blocks(random, vocab, hidden, Type.Q4_0), raw_dtype=Type.Q4_0)
    out.add_tensor("output_norm.weight", ones)
    weight = bf16(random, vocab, hidden) if head == Type.BF16 else blocks(random, vocab, hidden, head)
    out.add_tensor("output.weight", weight, raw_dtype=head)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden),
              "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        out.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        out.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, (n, k) in shapes.items():
            out.add_tensor(f"blk.{layer}.{name}.weight", blocks(random, n, k, Type.Q4_0), raw_dtype=Type.Q4_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


_QUIET = llama_cpp.llama_log_callback(lambda *_: None)  # llama.cpp does not keep it alive


def begin() -> None:
    """What llama.cpp wants first, and no log."""
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


class Model:
    """A file that llama.cpp has loaded, with room for a prompt and tokens after it."""

    def __init__(self, path: Path, threads: int, prompt: int, tokens: int) -> None:
        self.prompt, self.tokens = prompt, tokens
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = prompt + tokens + 8, threads, threads
        params.n_batch = max(prompt, params.n_batch)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise SystemExit(f"llama.cpp does not load {path}")

    def request(self, seed: int, vocab: int) -> tuple[float, float]:
        """Seconds of a prompt of random tokens, and the median of the tokens after it."""
        ids = np.random.default_rng(seed).integers(0, vocab, self.prompt + self.tokens).tolist()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        first = self._run(ids[: self.prompt])
        return first, statistics.median(self._run([i]) for i in ids[self.prompt :])

    def _run(self, ids: list[int]) -> float:
        array = (ctypes.c_int32 * len(ids))(*ids)  # the batch does not keep it alive
        batch = llama_cpp.llama_batch_get_one(array, len(ids))
        start = time.perf_counter()
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start

    def free(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def measure(path: Path, threads: int, prompt: int, tokens: int, repeats: int, vocab: int) -> dict:
    """{"prefill_s", "token_ms"}: median, min and max over the repeats, each with a prompt of its own, after one uncounted.

    A repeat in which other processes took more than 5 % of the CPU's time is done again.
    """
    model = Model(path, threads, prompt, tokens)
    prefill, token = [], []
    repeat, tries = -1, 0
    while repeat < repeats:
        tries += 1
        wall, own, before = time.perf_counter(), time.process_time(), busy_seconds()
        first, each = model.request(repeat + 2, vocab)
        others = (busy_seconds() - before) - (time.process_time() - own)
        if repeat >= 0 and others > 0.05 * (time.perf_counter() - wall) * (os.cpu_count() or 1) and tries < 40 * repeats:
            time.sleep(2)  # other processes ran meanwhile: once more
            continue
        if repeat >= 0:
            prefill.append(first)
            token.append(each * 1e3)
        repeat += 1
    model.free()
    return {"prefill_s": summary(prefill), "token_ms": summary(token)}


def busy_seconds() -> float:
    """CPU time that all processes have had, by the kernel's clock."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split(None, 4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def summary(samples: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(samples), 4), "min": round(min(samples), 4), "max": round(max(samples), 4)}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--prompt", type=int, default=1024)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    config = presets.preset(PRESET, LAYERS)
    begin()
    records = []
    for head in (Type.BF16, Type.Q6_K):
        with tempfile.TemporaryDirectory() as tmp:
            file = Path(tmp) / "model.gguf"
            write(file, config, head)
            size = file.stat().st_size
            found = measure(file, a.threads, a.prompt, a.tokens, a.repeats, config["vocab_size"])
        records.append({"weights": "Q4_0", "head": head.name, "file_gib": round(size / 2**30, 3), **found})
        print(records[-1], flush=True)
    result = {
        "command": f"python benchmarks/llamacpp.py OUT.json --threads {a.threads} --repeats {a.repeats}",
        "environment": {
            "device": cpu_name(), "cores": os.cpu_count(), "threads": a.threads, "date": time.strftime("%Y-%m-%d"),
            "llama-cpp-python": metadata.version("llama-cpp-python"),
            "system": llama_cpp.llama_print_system_info().decode().strip(), "load": round(os.getloadavg()[0], 2),
        },
        "workload": {"model": f"{PRESET}, {LAYERS} layers", "prompt_tokens": a.prompt, "output_tokens": a.tokens},
        "records": records,
    }  # fmt: skip
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
