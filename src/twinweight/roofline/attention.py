"""The work of attention, from the inputs of its ops.

Where sequences have lengths of their own (vLLM's packed batches), only a batch of one is known exactly: its lengths are
among the scalars. Otherwise a step's label may carry the sums (`steps.Lengths`); else the work is left unknown.
"""

from __future__ import annotations

import math

from twinweight.roofline.dtypes import rate, size
from twinweight.roofline.records import Signature, Work

# Where an op has its is_causal argument.
_CAUSAL = {
    "aten::scaled_dot_product_attention": 5, "aten::_scaled_dot_product_attention_math": 5,
    "aten::_scaled_dot_product_attention_math_for_mps": 5, "aten::_scaled_dot_product_flash_attention": 4,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 4, "aten::_scaled_dot_product_efficient_attention": 6,
    "aten::_scaled_dot_product_cudnn_attention": 6,
}  # fmt: skip
# vLLM's flash attention: arguments of the cumulative query lengths, the longest query, the longest context, causal.
_PACKED = {"_vllm_fa3_C::fwd": (7, 12, 13, 24), "_vllm_fa2_C::varlen_fwd": (4, 10, 11, 15)}


def attention(name: str, inputs: Signature) -> Work | None:
    """The work of one attention op; of packed sequences perhaps only the rows; or None."""
    if name in _CAUSAL:
        return _padded(inputs, causal=inputs.values[_CAUSAL[name]] == "True")
    if name in _PACKED and (work := _packed(inputs, *_PACKED[name])):
        return work
    packed = len(inputs.dims[0]) == 3
    return Work(rows=inputs.dims[0][0], dtype=rate(inputs.types[0])) if packed else None


def _padded(inputs: Signature, *, causal: bool) -> Work:
    """q [B, H, S, D], k [B, H', S', D], v [B, H', S', D']."""
    (batch, heads, queries, d), keys, d_v = inputs.dims[0], inputs.dims[1][2], inputs.dims[2][3]
    flops = 2 * batch * heads * queries * keys * (d + d_v)
    needed = flops * (keys + 1) // (2 * keys) if causal and queries == keys else flops
    item = size(inputs.types[0])
    moved = (batch * heads * queries * (d + d_v) + math.prod(inputs.dims[1]) + math.prod(inputs.dims[2])) * item
    shape = f"{batch}x{heads}x{queries}x{d}"
    return Work(flops, needed, moved, rate(inputs.types[0]), shape, batch * queries)


def _packed(inputs: Signature, lengths: int, longest_q: int, longest_k: int, causal_at: int) -> Work | None:
    """q [T, H, D], cache [blocks, size, H', D], one more length than sequences."""
    (tokens, heads, d), kv_heads = inputs.dims[0], inputs.dims[1][-2]
    if inputs.dims[lengths] != (2,):
        return None
    queries, keys = int(inputs.values[longest_q]), int(inputs.values[longest_k])
    if queries != tokens:
        return None  # padded for a CUDA graph: the numbers are not the step's
    causal = inputs.values[causal_at] == "True"
    return packed_work(inputs.types[0], heads, kv_heads, d, tokens, queries * keys, keys, causal=causal)


def packed_work(
    dtype: str, heads: int, kv_heads: int, d: int, tokens: int, pairs: int, context: int, *, causal: bool, sequences: int = 1
) -> Work:
    """tokens: query tokens; pairs: sum over sequences of queries x keys; context: keys of all sequences."""
    flops = 4 * heads * d * pairs
    # A causal query does not see those that come after it in its own sequence.
    hidden = tokens * (tokens - 1) // 2 if causal and sequences == 1 else 0
    item = size(dtype)
    moved = (2 * tokens * heads + 2 * context * kv_heads) * d * item
    return Work(flops, 4 * heads * d * (pairs - hidden), moved, rate(dtype), f"{tokens}x{heads}x{d}", tokens)
