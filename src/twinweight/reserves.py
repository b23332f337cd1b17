"""What a vLLM server needs beside weights, twins and KV cache: estimates, for a plan made before it has run."""

from __future__ import annotations

GRAPH_BYTES = 16 << 20


def activation_bytes(*, tokens: int, widest: int, hidden: int, itemsize: int, sequences: int, vocabulary: int) -> int:
    """The peak of activations in a step of `tokens` rows: the widest linear's output, half of it again behind the gate, and
    four rows of the hidden size; or, where that is more, the logits of all sequences in fp32, three times over.

    vLLM 0.26 on an H200 (16384 tokens, 1024 sequences) kept 2.0 GiB for llama-3.1-8b and 3.4 for qwen3-32b beside weights and
    KV cache; this gives 1.8 and 3.0. A server that measures more drops twins until its KV floor holds.
    """
    return max(tokens * (widest * 3 // 2 + 4 * hidden) * itemsize, sequences * vocabulary * 4 * 3)


def graphs_bytes(sizes: int) -> int:
    """What CUDA graphs of that many batch sizes take, with the workspaces of libraries: 16 MiB each."""
    return sizes * GRAPH_BYTES


def captured_sizes(sequences: int, tokens: int) -> int:
    """How many batch sizes vLLM captures by default (0.26 to 0.32, `VllmConfig._set_cudagraph_sizes`)."""
    most = min(2 * sequences, 512, tokens)
    sizes = [m for m in (1, 2, 4) if m <= most]
    return len(sizes) + len(range(8, min(most + 1, 256), 8)) + len(range(256, most + 1, 16))


def batch_defaults(memory: int, name: str) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) of a `vllm serve` on a GPU with `memory` bytes (0.32,
    `EngineArgs.get_batch_defaults`).
    """
    gib = memory / (1 << 30)
    if gib >= 160:
        return 16384, 1024
    if gib >= 70 and "a100" not in name.lower():
        return 8192, 1024
    return 2048, 256
