"""How fast a model could prefill on a GPU: from stored measurements where there are some, else from the GPU's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinweight import cache, gpus
from twinweight.errors import ConfigError
from twinweight.gpus import Gpu
from twinweight.measured import Costs, Form, Measured
from twinweight.plan import Plan, TwinOption
from twinweight.sharding import Kind, Rank
from twinweight.workload import Workload

_DECODE_ROWS = 16  # up to here a call takes the time of reading its weight: the rows of one matrix instruction
_ITEMSIZE = 2


@dataclass(frozen=True)
class Roofline:
    """The `Offer` of a GPU's figures alone: without a twin, each call of many rows expands the weight (`stream`), and a twin
    saves that; every GEMM runs at the peak. An int4 kernel that unpacks inside the GEMM may do better or worse.
    """

    kind: Kind
    gpu: Gpu
    forms: tuple[Form, ...]

    def seconds(self, form: Form | None, workload: Workload) -> float:
        """Seconds of an average call at the limits of the GPU."""
        n, k, peak = self.kind.n, self.kind.k, _peak(self.gpu)
        expanding = (self.kind.nbytes + n * k * _ITEMSIZE) / self.gpu.bandwidth if form is None else 0.0
        total = 0.0
        for m, share in workload.calls:
            if m <= _DECODE_ROWS:
                total += share * self.kind.nbytes / self.gpu.bandwidth
            else:
                moved = (n * k + m * (n + k)) * _ITEMSIZE
                total += share * (max(2 * m * n * k / peak, moved / self.gpu.bandwidth) + expanding)
        return total

    def options(self, workload: Workload) -> tuple[TwinOption, ...]:
        """A bf16 twin and what it saves."""
        without = self.seconds(None, workload)
        return tuple(TwinOption(f.name, f.nbytes, (without - self.seconds(f, workload)) * 1e6) for f in self.forms)

    def gains(self, workload: Workload) -> Mapping[int, tuple[float, float]]:
        """Nothing: a bound is no time to compare with."""
        return {}


Offered = Costs | Roofline


def _peak(gpu: Gpu) -> float:
    peak = gpu.peak("bfloat16")
    if peak is None:
        raise ConfigError(f"{gpu.name} has no rate for 16-bit products")
    return peak


def offers(gpu: Gpu, rank: Rank) -> tuple[dict[Kind, Offered], str]:
    """What each kind of weight could have: by stored measurements of this GPU where all kinds have one, else by a roofline."""
    from twinweight.engines.vllm.offers import costs, forms

    kinds = list(dict.fromkeys(rank.weights.values()))
    stored = _stored(gpu, kinds)
    found_for: dict[Kind, Offered] = {}
    for kind in kinds:
        nbytes = kind.n * _padded(kind.k, gpu) * _ITEMSIZE
        found, in_vllm = stored.get(kind, (None, False))
        if found is None or len(stored) < len(kinds):
            found_for[kind] = Roofline(kind, gpu, (Form("bfloat16", nbytes, ("twin:bfloat16",)),))
        elif in_vllm:
            held = forms(_copy_bytes(kind), {"bfloat16": nbytes})
            found_for[kind] = costs(found, held, kind.n, layers=len(rank.weights))
        else:
            twin = Form("bfloat16", nbytes, found.with_twin("twin:bfloat16"))
            found_for[kind] = Costs(found, Form("none", 0, found.plain), (twin,), kind.n)
    return found_for, "measured" if kinds and len(stored) == len(kinds) else "roofline"


def _copy_bytes(kind: Kind) -> int | None:
    """Bytes of an own int4 copy inside vLLM, where there can be one."""
    from twinweight.kernels.gpu import weight_bytes

    return None if kind.act_order else weight_bytes(kind.n, kind.k, kind.group_size, False, kind.symmetric)


def _padded(k: int, gpu: Gpu) -> int:
    from twinweight.kernels.padding import RDNA3_CLIFF, padded_stride

    return padded_stride(k, _ITEMSIZE, cliff_bytes=RDNA3_CLIFF if gpu.name.lower().startswith("gfx11") else 0)


def _stored(gpu: Gpu, kinds: list[Kind]) -> dict[Kind, tuple[Measured, bool]]:
    """Measurements of a GPU in the cache, and whether they are of vLLM's kernels, which come before ours; the newest first."""
    store = cache.default()
    found: dict[tuple[bool, Kind], Measured] = {}
    for record in store.records() if store is not None else ():
        device, shape = record.device, record.shape
        try:
            same = device.get("type") != "cpu" and gpus.gpu(str(device.get("name"))).name == gpu.name
        except ConfigError:
            same = False
        kind = next((k for k in kinds if _is_of(shape, k)), None) if same else None
        if kind is not None and "twin:bfloat16" in record.measured.times and record.measured.plain:
            found.setdefault((shape.get("engine") == "vllm", kind), record.measured)
    of_vllm_last = sorted(found.items(), key=lambda item: item[0][0])
    return {kind: (measured, in_vllm) for (in_vllm, kind), measured in of_vllm_last}


def _is_of(shape: Mapping[str, Any], kind: Kind) -> bool:
    """Whether a stored shape is this kind: of vLLM's kernels or ours."""
    group = shape.get("group_size")
    same = (shape.get("n"), shape.get("k"), shape.get("act_order")) == (kind.n, kind.k, kind.act_order)
    symmetric = shape["symmetric"] if "symmetric" in shape else not shape.get("zero_points")
    return same and symmetric == kind.symmetric and (group == kind.group_size or (group == -1 and kind.group_size == kind.k))


def prefill_speed(rank: Rank, gpu: Gpu, offered: Mapping[Kind, Offered], found: Plan, tokens: int) -> int | None:
    """Prompt tokens a second in a step of `tokens` rows of one prompt: the weights as offered, and at the roof what else is
    computed (attention over the step itself, experts). Between GPUs nothing is counted.
    """
    step = Workload.prefill(tokens)
    seconds = {(kind, f.name if f else None): o.seconds(f, step) for kind, o in offered.items() for f in (None, *o.forms)}
    built = {name: option.name for name, option in found.twins.items()}
    linear = sum(seconds[kind, built.get(name)] for name, kind in rank.weights.items())
    attention = 4 * tokens * tokens / 2 * rank.head_dims * rank.layers
    total = linear + (attention + 2 * tokens * rank.active_experts) / _peak(gpu)
    return round(tokens / total) if total else None


def decode_bound(rank: Rank, gpu: Gpu) -> float:
    """Tokens a second that the bandwidth allows one sequence: every int4 weight and the head are read once a token."""
    idle_experts = (rank.expert_weights - rank.active_experts) // 2
    return gpu.bandwidth / max(1, rank.weight_bytes - rank.embedding_bytes - idle_experts)
