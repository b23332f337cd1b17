"""Estimates of what a server needs beside weights and KV cache; the plugin uses the same ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from twinweight import reserves
from twinweight.engines.vllm import compat


@pytest.mark.parametrize(
    ("sequences", "tokens", "expected"),
    [(1, 2048, 2), (2, 2048, 3), (4, 2048, 4), (128, 2048, 35), (256, 2048, 51), (1024, 8192, 51), (1024, 100, 15), (8, 1, 1)],
)
def test_captured_sizes(sequences: int, tokens: int, expected: int) -> None:
    """1, 2, 4, every 8th below 256, every 16th to twice the sequences, at most 512 and never more than a step's tokens."""
    assert reserves.captured_sizes(sequences, tokens) == expected


@pytest.mark.parametrize(
    ("gib", "name", "expected"),
    [(24, "RTX 4090", (2048, 256)), (80, "A100", (2048, 256)), (80, "H100", (8192, 1024)), (192, "MI300X", (16384, 1024))],
)
def test_batch_defaults(gib: int, name: str, expected: tuple[int, int]) -> None:
    assert reserves.batch_defaults(gib << 30, name) == expected


@pytest.mark.parametrize(("tokens", "sequences", "expected"), [(16384, 1024, 1946157056), (128, 1024, 1576009728), (0, 0, 0)])
def test_the_plugin_estimates_alike(tokens: int, sequences: int, expected: int) -> None:
    """llama-3.1-8b: 16384 x (28672 x 1.5 + 4 x 4096) x 2, or 1024 x 128256 x 12."""
    model = SimpleNamespace(get_hidden_size=lambda: 4096, get_vocab_size=lambda: 128256, dtype=torch.bfloat16)
    scheduler = SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=sequences)
    worker = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model, scheduler_config=scheduler))
    found = reserves.activation_bytes(
        tokens=tokens, widest=28672, hidden=4096, itemsize=2, sequences=sequences, vocabulary=128256
    )
    assert found == compat.activation_bytes(worker, 28672) == expected
