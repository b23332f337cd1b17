"""`twinweight plan`: what each mode gives on a GPU that nobody has rented yet, from a config.json and the GPU's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from twinweight import estimate, presets, reserves
from twinweight.checkpoint import read_json
from twinweight.engines.vllm.config import Config
from twinweight.errors import BudgetError, CheckpointError, ConfigError, TwinweightError
from twinweight.gpus import Gpu
from twinweight.plan import GIB, Budget, Mode, Plan, plan
from twinweight.roofs import roof_by_name
from twinweight.sharding import Kind, Rank, shard
from twinweight.workload import Workload

_ITEMSIZE = 2


@dataclass(frozen=True)
class Request:
    """What is asked. None is vLLM's default.

    kv_floor: KV-cache tokens that twins may never take; at least max_model_len, which is the model's maximum where neither is
    given. utilization: share of the GPU's memory. tokens, sequences: max_num_batched_tokens, max_num_seqs. workload: the rows
    of calls to choose for; None is prefills of `tokens` rows.
    """

    gpu: str
    tp: int = 1
    utilization: float = 0.9
    max_model_len: int | None = None
    kv_floor: int | None = None
    tokens: int | None = None
    sequences: int | None = None
    workload: Workload | None = None


def read_config(model: str) -> tuple[dict[str, Any], Path]:
    """The config.json of a directory, of a file, or of a preset's name. Raises ConfigError where it is none of these."""
    path = Path(model)
    if path.is_dir():
        config = read_json(path / "config.json")
        old = next((path / f for f in ("quantize_config.json", "quant_config.json") if (path / f).exists()), None)
        if old is not None and not config.get("quantization_config"):
            method = "gptq" if old.name == "quantize_config.json" else "awq"
            config["quantization_config"] = {"quant_method": method, **read_json(old)}
        return config, path / "config.json"
    if path.is_file():
        return read_json(path), path
    try:
        return presets.preset(model), Path(f"{model} (preset)")
    except ConfigError as error:
        raise ConfigError(f"{model!r} is no directory, no config.json, and no preset: {error}") from error


def plan_model(model: str, ask: Request) -> dict[str, Any]:
    """What the modes give, as a dictionary: {"budget": {line: bytes}, "modes": {mode: {"twins", "weights", "twin_bytes",
    "kv_tokens", "fits", ...}}, "speed", "shapes", "assumptions", "verdicts" (what does not fit), "refused" (why no twin is
    worth it), ...}; bytes and tokens are those of one rank.

    Raises ConfigError and UnsupportedError for what cannot be planned.
    """
    config, file = read_config(model)
    for key in ("model_type", "num_hidden_layers") if "text_config" not in config else ("model_type",):
        if key not in config:
            raise CheckpointError(file=file, expected=f"{key} (the config.json of a model)", found="none")
    gpu = roof_by_name(ask.gpu)
    try:
        rank = shard(config, ask.tp, file)
    except TwinweightError:
        raise
    except Exception as error:  # whatever transformers raises for it
        found = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(file=file, expected="the config.json of a decoder", found=found) from error
    budget, floor, tokens = _budget(ask, gpu, rank)
    offers, source = estimate.offers(gpu, rank)
    served = Config("soft").planned_for(tokens) if source == "measured" else Workload.prefill(tokens)
    workload = ask.workload or served
    modes: dict[str, dict[str, Any]] = {}
    plans: dict[str, Plan] = {}
    verdicts: dict[str, str] = {}
    for mode in get_args(Mode):
        modes[mode], plans[mode], verdicts[mode] = _mode(mode, budget, rank, offers, workload)
        modes[mode]["prefill_tok_s"] = estimate.prefill_speed(rank, gpu, offers, plans[mode], tokens)
    shapes = _shapes(rank, plans)
    return {
        "model": model, "gpu": gpu.name, "tp": ask.tp, "utilization": ask.utilization, "kv_floor_tokens": floor,
        "max_num_batched_tokens": tokens, "kv_bytes_per_token": rank.kv_bytes_per_token, "budget": budget.lines(),
        "modes": modes, "verdicts": {m: v for m, v in verdicts.items() if v},
        "refused": {m: p.refused for m, p in plans.items() if p.refused}, "shapes": shapes, "workload":
        [list(c) for c in workload.calls], "assumptions": list(rank.assumptions), "decode_tok_s_bound":
        round(estimate.decode_bound(rank, gpu), 1), "speed": {"source": source, "figures": dict(gpu.source)},
    }  # fmt: skip


def _budget(ask: Request, gpu: Gpu, rank: Rank) -> tuple[Budget, int, int]:
    """The budget of one rank, the floor in tokens, and the rows of a step."""
    from twinweight.engines.vllm.build import transient_bytes
    from twinweight.kernels.stream import SCRATCH_BYTES

    tokens, sequences = reserves.batch_defaults(gpu.memory_bytes, gpu.name)
    tokens, sequences = ask.tokens or tokens, ask.sequences or sequences
    for what, value in (("max model length", ask.max_model_len), ("KV floor", ask.kv_floor), ("batched tokens", ask.tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{what} is {value}, expected at least 1 token")
    longest = ask.max_model_len or (rank.longest if ask.kv_floor is None else 0)
    floor = max(ask.kv_floor or 0, longest)
    activations = reserves.activation_bytes(
        tokens=tokens,
        widest=rank.widest,
        hidden=rank.hidden,
        itemsize=_ITEMSIZE,
        sequences=sequences,
        vocabulary=rank.vocabulary,
    )
    scratch = min(SCRATCH_BYTES, max((k.n * k.k * _ITEMSIZE for k in rank.weights.values()), default=0))
    kept = (
        ("activations", activations),
        ("graphs and libraries", reserves.graphs_bytes(reserves.captured_sizes(sequences, tokens))),
        ("scratch of stream", scratch),
    )
    transient = max((transient_bytes(k.n, k.k) for k in rank.weights.values()), default=0)
    total = gpu.memory_bytes
    budget = Budget(
        total, total - rank.weight_bytes, ask.utilization, transient, floor * rank.kv_bytes_per_token, kept,
        weights=rank.weight_bytes, kv_unknown=ask.kv_floor is None,
    )  # fmt: skip
    return budget, floor, tokens


# --- the modes ---


def _mode(
    mode: Mode, budget: Budget, rank: Rank, offers: Mapping[Kind, estimate.Offered], workload: Workload
) -> tuple[dict[str, Any], Plan, str]:
    """One mode's result, its plan (all twins where they do not fit in `hard`), and what to say where something does not fit."""
    from twinweight.engines.vllm.offers import OWN

    options = {kind: max(offers[kind].options(workload), key=lambda o: o.saved_us) for kind in set(rank.weights.values())}
    paying = {name: options[kind] for name, kind in rank.weights.items() if options[kind].saved_us > 0}
    wanted = sum(o.nbytes for o in paying.values())
    reserved = dict(budget.reserves)["scratch of stream"]
    scratch = reserved if mode == "off" else 0  # nothing is expanded there
    short = budget.kv_floor - budget.kv_bytes(0) - scratch
    starts = short <= 0
    says, fits = "", starts
    found = Plan(mode, budget, {}, {})
    halved = (budget.weights + budget.kv_floor + (wanted if starts else 0)) // 2  # without a start no twin is what is short
    others = [(halved, "twice as many GPUs (--tp)")]
    levers = budget.levers(wanted, others, mode) if starts else budget.levers(0, others, "soft", short)
    try:
        if starts:
            found = plan(rank.weights, budget, offers, workload, mode)
            if found.missed:
                says = f"{len(found.missed)} of {len(paying)} twins do not fit\n{budget.arithmetic(wanted)}\n{levers}"
        else:
            beside = "beside the scratch of stream" if mode != "off" and short <= reserved else "twins or none"
            usable = budget.total - budget.untouchable
            weights = f"the weights do not fit: {budget.weights / GIB:.2f} of {usable / GIB:.2f} GiB"
            what = weights if budget.weights > usable else f"the KV floor does not fit, {beside}"
            says = f"{what}\n{budget.arithmetic(0 if mode == 'off' else wanted)}\n{levers}"
    except BudgetError:
        fits = False
        says = f"not all of {len(paying)} twins fit\n{budget.arithmetic(wanted)}\n{levers}"
        found = Plan(mode, budget, paying, {})
    kv, built = max(0, budget.kv_bytes(found.twin_bytes) + scratch), found.twins.values()
    result = {
        "twins": sum(o.is_twin for o in built), "copies": sum(OWN in o.name.split("+") for o in built),
        "weights": len(rank.weights), "twin_bytes": found.twin_bytes,
        "kv_tokens": kv // rank.kv_bytes_per_token if rank.kv_bytes_per_token else 0, "kv_bytes": kv, "fits": fits,
        "missing_bytes": 0 if fits else found.twin_bytes - budget.left if starts else short,
    }  # fmt: skip
    return result, found, says


def _shapes(rank: Rank, plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """Weights by shape, with how many have a twin in each mode."""
    rows: dict[Kind, dict[str, Any]] = {}
    for name, kind in rank.weights.items():
        new = {"n": kind.n, "k": kind.k, "count": 0, "int4_bytes": kind.nbytes, **dict.fromkeys(plans, 0)}
        row = rows.setdefault(kind, new)
        row["count"] += 1
        for mode, found in plans.items():
            row[mode] += name in found.twins and found.twins[name].is_twin
    return list(rows.values())
