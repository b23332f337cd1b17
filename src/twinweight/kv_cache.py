"""What a token takes in a KV cache, by the kinds of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# `layer_types` of a config.json, by transformers 5: what keeps a state instead, or nothing, and what keeps a window.
_STATE = frozenset(("linear_attention", "conv", "mamba"))
_NO_TOKENS = _STATE | {"moe", "dense", "sparse"}
_WINDOW = frozenset(
    ("sliding_attention", "chunked_attention", "window_attention", "hybrid_sliding", "reference_sliding_attention")
)


def bytes_per_token(layers: int, kinds: Sequence[str] | None, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that one token adds: keys and values of every layer that keeps them.

    kinds: of the layers, where the config says (`layer_types`). A layer with a window counts as one without, so that what
    follows is the least that fits.
    """
    keeping = layers if not kinds else sum(kind not in _NO_TOKENS for kind in kinds)
    return 2 * keeping * kv_heads * head_dim * itemsize


def key_value_heads(get: Callable[[str], Any], heads: int) -> int:
    """Key-value heads of a text config, whose fields `get` gives, or None. heads: of queries."""
    if get("multi_query") and not get("new_decoder_architecture"):  # Falcon's
        return 1
    return int(get("num_key_value_heads") or get("num_kv_heads") or heads)


def stateful(kinds: Sequence[str] | None) -> int:
    """Layers that keep a state a sequence in place of tokens."""
    return sum(kind in _STATE for kind in kinds or ())


def windowed(kinds: Sequence[str] | None) -> int:
    """Layers that keep the last tokens alone."""
    return sum(kind in _WINDOW for kind in kinds or ())


@dataclass(frozen=True)
class KVFloor:
    """tokens: what is never given to twins, in nbytes. per_token: bytes of one more; 0 where the model keeps no KV cache."""

    tokens: int
    nbytes: int
    per_token: float
