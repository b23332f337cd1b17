"""What tests share: a tolerance, random weights, a model with latent attention, kernels that other processes compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.weight import Int4Weight, from_values

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "rope_theta": 10000.0,
}  # fmt: skip
"""DeepSeek-V3's config.json, cut to a dense layer and two with experts."""


def latent_model(heads: int, **sizes: int) -> dict[str, Any]:
    """One like it of two dense layers, small."""
    small = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "n_routed_experts": 8, "num_experts_per_tok": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1}
    return {**DEEPSEEK, **small, **tokens, "num_attention_heads": heads, "num_key_value_heads": heads, **sizes}


def assert_close(actual: Tensor, reference: Tensor, max_err: float = 2e-2, rms_err: float = 4e-3) -> None:
    """actual against a float64 reference: largest error over the largest value, rms error over the rms."""
    assert actual.shape == reference.shape, f"shape {list(actual.shape)}, expected {list(reference.shape)}"
    if reference.numel() == 0:
        return
    error = actual.double() - reference.double()
    assert bool(torch.isfinite(error).all()), "NaN or infinity"
    tiny = torch.finfo(torch.float64).tiny
    largest = float(error.abs().max() / reference.double().abs().max().clamp_min(tiny))
    rms = float(error.square().mean().sqrt() / reference.double().square().mean().sqrt().clamp_min(tiny))
    assert largest <= max_err, f"normalised max error {largest:.3e} > {max_err:.0e} (rms {rms:.3e})"
    assert rms <= rms_err, f"normalised rms error {rms:.3e} > {rms_err:.0e} (max {largest:.3e})"


def random_weight(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = True,
    act_order: bool = False,
    seed: int = 0,
) -> Int4Weight:
    """A random int4 weight [n, k] on the CPU, entries of order 1 / sqrt(k). group_size: divides k; k for per channel."""
    generator = torch.Generator().manual_seed(seed)
    groups = k // group_size
    values = torch.randint(0, 16, (n, k), generator=generator)
    scales = ((0.5 + torch.rand(n, groups, generator=generator)) / (5 * k**0.5)).to(dtype)
    zeros = None if symmetric else torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    g_idx = (torch.randperm(k, generator=generator) // group_size).to(torch.int32) if act_order else None
    return from_values(values, scales, zeros, g_idx, group_size=group_size)


def compiled_ahead(cache: Path) -> dict[str, Any]:
    """What `kernels/compile_ahead.py` says, with an empty directory for Triton: in this process that may be the interpreter."""
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, str(root / "tests/kernels/compile_ahead.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
