"""What one rank of a server holds of a model, from its config.json alone, sharded over GPUs as vLLM does it.

q, k and v are one weight there, and so are gate and up. Column-parallel weights (those two, and others) split their output
features, row-parallel ones (o_proj, down_proj) their input features; where there are fewer KV heads than ranks, each rank holds
one whole. Embedding and head split the vocabulary, padded to 64. Norms and a vision tower are whole on every rank. With latent
attention (DeepSeek's) every rank has all latents, and the weights that compress to them; those that expand heads are split, and
kept in 16 bits as well.
Source: vLLM 0.32 `model_executor/layers/linear.py`, `vocab_parallel_embedding.py`, `models/deepseek_v2.py`,
`layers/attention/mla_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from twinweight.errors import ConfigError, UnsupportedError
from twinweight.formats import awq, compressed_tensors, gptq
from twinweight.formats.common import is_head
from twinweight.kv_cache import bytes_per_token, key_value_heads, stateful, windowed

_MERGED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa")
"""What compresses to latents: one weight, where queries are compressed too."""
_LATENT_MODELS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
_ROW_PARALLEL = frozenset(("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "c_proj", "wo", "w2"))
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_VOCABULARY = 64
_ITEMSIZE = 2
_ASSUMED = "config.json names no quantization: W4A16 with groups of 128, symmetric, is assumed"


@dataclass(frozen=True)
class Kind:
    """A W4A16 weight [n, k] of one rank: weights of equal `Kind` cost and gain the same. group_size: k for per channel."""

    n: int
    k: int
    group_size: int
    symmetric: bool
    act_order: bool

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"

    @property
    def nbytes(self) -> int:
        """Bytes as int4, by the layout of `Int4Weight`."""
        from twinweight.kernels import gpu

        return gpu.weight_bytes(self.n, self.k, self.group_size, self.act_order, self.symmetric)


@dataclass(frozen=True)
class Rank:
    """One rank's share of a model.

    weights: those that may have a twin, in module order. other_bytes: everything else, of which embedding_bytes are only looked
    up. expert_weights: elements of int4 experts, which have no twin, and active_experts: those that one token meets.
    kv_bytes_per_token: keys and values in 16 bits. head_dims: query heads times their size, a layer.
    """

    weights: Mapping[str, Kind]
    other_bytes: int
    embedding_bytes: int
    expert_weights: int
    active_experts: int
    kv_bytes_per_token: int
    layers: int
    hidden: int
    head_dims: int
    vocabulary: int
    longest: int
    assumptions: tuple[str, ...]

    @property
    def int4_bytes(self) -> int:
        """Bytes of the weights that may have a twin."""
        return sum(kind.nbytes for kind in self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.int4_bytes + self.other_bytes

    @property
    def multiplied(self) -> int:
        """Elements of the weights that a token is multiplied with, the head left out."""
        return sum(kind.n * kind.k for kind in self.weights.values()) + self.active_experts

    @property
    def widest(self) -> int:
        """The largest input or output of a linear weight."""
        return max((max(kind.n, kind.k) for kind in self.weights.values()), default=self.hidden)


Module = tuple[int, bool, bool]  # group_size (-1 per channel), symmetric, act_order


def shard(config: Mapping[str, Any], tp: int = 1, file: Path | None = None) -> Rank:
    """One rank of `tp`, of the model a `config.json` describes; a config without quantization is taken as W4A16 g128.

    file: named in errors. Raises ConfigError where the model cannot be split so, UnsupportedError for other quantizations.
    """
    from twinweight.synth import quantized_modules, skeleton

    source = file or Path("config.json")
    given = {**config, **config.get("text_config", {})}
    scheme, assumptions = _scheme(config, source)
    model: Any = skeleton({k: v for k, v in config.items() if k != "quantization_config"})
    # A config.json leaves out what its model has by default.
    text = {**model.config.get_text_config().to_dict(), **given}
    decoder = quantized_modules(model)
    heads = int(text["num_attention_heads"])
    kv_heads = key_value_heads(text.get, heads)
    latent = _latent_dims(text)
    head_dim = latent.head if latent else int(text.get("head_dim") or text["hidden_size"] // heads)
    if tp < 1 or heads % tp or (kv_heads % tp and tp % kv_heads):
        raise ConfigError(f"--tp {tp}: {heads} attention and {kv_heads} key-value heads do not split over so many GPUs")
    own_kv = max(1, kv_heads // tp)
    joined = (heads + 2 * kv_heads) * head_dim, (heads // tp + 2 * own_kv) * head_dim

    merged_into = dict(_MERGED)
    if latent is not None:
        del merged_into["q_proj"]
        merged_into |= dict.fromkeys(_WHOLE, "fused_qkv_a_proj") if text.get("q_lora_rank") else {}
    parts: dict[str, list[tuple[int, int, Module | None]]] = {}
    weights, other = {}, 0
    for name, (n, k) in decoder.items():
        parent, _, last = name.rpartition(".")
        if last in _ROW_PARALLEL:
            k = _split(k, tp, name)
        elif last not in _WHOLE:
            n = _rows(last, n, tp, kv_heads, joined, name)
        other += n * k * _ITEMSIZE if last == "kv_b_proj" else 0  # besides the weight itself, for decode
        merged = f"{parent}.{merged_into[last]}" if last in merged_into else name
        parts.setdefault(merged, []).append((n, k, scheme(name)))
    for name, found in parts.items():
        n, k, how = sum(n for n, _, _ in found), found[0][1], found[0][2]
        if any(part[2] != how for part in found):
            raise UnsupportedError(file=source, tensor=name, expected="parts that are quantized alike", found="different ones")
        if how is None:
            other += n * k * _ITEMSIZE
            continue
        group = k if how[0] == -1 else how[0]
        if k % group:
            raise ConfigError(f"--tp {tp}: {name} has {k} input features a GPU, which groups of {group} do not divide")
        weights[name] = Kind(n, k, group, how[1], how[2])

    vocabulary = -(-int(text["vocab_size"]) // _VOCABULARY) * _VOCABULARY
    experts, embedding = 0, 0
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module in decoder and leaf == "weight":
            continue
        if parameter.ndim == 3 and module.endswith(".experts"):
            experts += parameter.numel() // tp
        elif parameter.ndim == 2 and parameter.shape[0] == text["vocab_size"]:
            rows, columns, how = -(-vocabulary // tp), parameter.shape[1], scheme(module) if is_head(module) else None
            kind = None if how is None else Kind(rows, columns, columns if how[0] == -1 else how[0], how[1], how[2])
            nbytes = rows * columns * _ITEMSIZE
            other += nbytes if kind is None else kind.nbytes
            embedding += 0 if "head" in name or text.get("tie_word_embeddings") else nbytes
        else:
            other += parameter.numel() * _ITEMSIZE
    size = next((kind.group_size for kind in weights.values()), 128)
    expert_bytes = experts // 2 + experts // size * 2
    other += expert_bytes
    layers, kinds = int(text["num_hidden_layers"]), text.get("layer_types")
    kv_rows = latent.token * layers if latent else _kv_rows(decoder, kv_heads, own_kv, head_dim)
    per_token, total = text.get("num_experts_per_tok") or 0, next((text[key] for key in _EXPERTS if text.get(key)), 1)
    return Rank(
        weights, other, embedding, experts, experts * per_token // total,
        bytes_per_token(layers, kinds, own_kv, head_dim, _ITEMSIZE) if kv_rows is None else kv_rows * _ITEMSIZE, layers,
        int(text["hidden_size"]), heads // tp * head_dim, int(text["vocab_size"]),
        int(text.get("max_position_embeddings") or 0), (*assumptions, *_notes(expert_bytes, kinds)),
    )  # fmt: skip


class _Latent(NamedTuple):
    """head: features of a query. token: of what a layer keeps of a token, on every rank."""

    head: int
    token: int


def _latent_dims(text: Mapping[str, Any]) -> _Latent | None:
    """Of latent attention; None for another. Raises ConfigError for a model of which something else is kept."""
    if not text.get("kv_lora_rank"):
        return None
    if text.get("model_type") not in _LATENT_MODELS or text.get("index_topk"):
        known = ", ".join(_LATENT_MODELS)
        raise ConfigError(f"plan knows latent attention (kv_lora_rank) of {known}, not of {text.get('model_type')}")
    rope = int(text["qk_rope_head_dim"])
    return _Latent(int(text["qk_nope_head_dim"]) + rope, int(text["kv_lora_rank"]) + rope)


def _rows(last: str, n: int, tp: int, kv_heads: int, joined: tuple[int, int], name: str) -> int:
    """Output features of one rank. joined: those of q, k and v together, of all ranks and of one."""
    if last in ("k_proj", "v_proj") and kv_heads < tp:
        return n // kv_heads
    return joined[1] if last in ("qkv_proj", "query_key_value") and n == joined[0] else _split(n, tp, name)


def _kv_rows(decoder: Mapping[str, tuple[int, int]], kv_heads: int, own_kv: int, head_dim: int) -> int | None:
    """Features of keys and values of one rank, all layers together, where a layer has others than the config says."""
    rows = [n for name, (n, _) in decoder.items() if name.rpartition(".")[2] in ("k_proj", "v_proj")]
    return None if all(n == kv_heads * head_dim for n in rows) else sum(rows) // kv_heads * own_kv


def _notes(expert_bytes: int, kinds: Sequence[str] | None) -> Iterator[str]:
    """What a reader of a plan would not expect."""
    if expert_bytes:
        yield f"experts have no twin: {expert_bytes / 2**30:.3f} GiB of the weights stay int4, in the engine's own kernels"
    if some := stateful(kinds):
        yield f"{some} of {len(kinds or ())} layers keep a state a sequence in place of tokens; these states are not counted"
    if few := windowed(kinds):
        yield f"{few} of {len(kinds or ())} layers keep a window of tokens, but count as if they kept all: more KV tokens fit"


def _split(size: int, tp: int, name: str) -> int:
    if size % tp:
        raise ConfigError(f"--tp {tp}: {name} has {size} features, which do not split over so many GPUs")
    return size // tp


def _scheme(config: Mapping[str, Any], file: Path) -> tuple[Callable[[str], Module | None], tuple[str, ...]]:
    """How each linear module of the decoder, or its head, is quantized, by its name; None where it stays dense."""
    found = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if found is None:
        return lambda name: None if is_head(name) else (128, True, False), (_ASSUMED,)
    method = str(found.get("quant_method")).lower()
    if method == "compressed-tensors":
        ours = compressed_tensors.parse(found, file)

        def by_group(name: str) -> Module | None:
            g = ours.group(name)
            return (g.group_size or -1, g.symmetric, g.act_order) if g is not None else None

        return by_group, ()
    if method == "gptq":
        theirs = gptq.parse(found, file)

        def by_rule(name: str) -> Module | None:
            p = theirs.module(name) if theirs.lm_head or not is_head(name) else None
            return (p.group_size or -1, p.symmetric, p.act_order) if p is not None else None

        return by_rule, ()
    if method == "awq":
        third = awq.parse(found, file)
        kind = (third.group_size or -1, not third.zero_point, False)
        return lambda name: None if is_head(name) or third.leaves_dense(name) else kind, ()
    raise UnsupportedError(file=file, expected="quant_method: compressed-tensors, gptq or awq", found=repr(method))
