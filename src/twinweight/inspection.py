"""`inspect` and `load-check`: what a checkpoint holds, and whether every path of a loaded one computes the same weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from twinweight.engines.hf import describe, kv_bytes_per_token
from twinweight.kernels import backend_for
from twinweight.linear import Int4Linear
from twinweight.plan import GIB
from twinweight.twin import dequantize
from twinweight.twins import int4_linears, twin_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IDENTITY_ROWS = 256
_ROUNDED = 0.05  # e4m3 has steps of 1/16 to 1/8 of a value; int8 is off by less


def inspect(path: str | Path) -> dict[str, Any]:
    """Shapes, counts and bytes of a checkpoint's int4 weights, from headers alone. Raises what `load` raises for a bad one.

    "twin_bytes" are those of bf16 twins of all weights, without padding.
    """
    found = describe(path)
    groups: dict[Any, int] = {}
    for shape in found.shapes.values():
        groups[shape] = groups.get(shape, 0) + 1
    backend = backend_for(torch.device("cpu"))
    rows = [
        {
            "n": s.n, "k": s.k, "count": count, "group_size": s.group_size, "symmetric": s.symmetric, "act_order": s.act_order,
            "int4_bytes": count * backend.weight_bytes(s.n, s.k, s.group_size, s.act_order, s.symmetric),
            "twin_bytes": count * s.n * s.k * 2,
        }
        for s, count in groups.items()
    ]  # fmt: skip
    return {
        "path": str(path), "architecture": found.architecture, "format": found.format, "weights": len(found.shapes), "shapes":
        rows, "int4_bytes": sum(int(r["int4_bytes"]) for r in rows), "twin_bytes": sum(int(r["twin_bytes"]) for r in rows),
        "dense_bytes": found.dense_bytes, "kv_bytes_per_token": kv_bytes_per_token(found.config, found.dtype),
    }  # fmt: skip


def check_loaded(model: PreTrainedModel) -> dict[str, Any]:
    """Feed identity rows through the int4 path of one weight of each shape, compare with its expansion, run one forward pass.

    An 8-bit twin rounds: its weight may be off by 5 % (rms), which is e4m3's; a stale or broken one is off by more.
    Returns {"ok", "checked": [{"name", "n", "k", "twin", "exact", "rounded"}], "finite", ...}.
    """
    linears = int4_linears(model)
    seen: dict[tuple[int, int, int, bool], str] = {}
    for name, linear in linears.items():
        seen.setdefault((linear.out_features, linear.in_features, linear.checkpoint_group_size, linear.twin is not None), name)
    checked: list[dict[str, Any]] = []
    for name in seen.values():
        linear = linears[name]
        twin = linear.twin_kind or "none"
        checked.append(
            {
                "name": name, "n": linear.out_features, "k": linear.in_features, "twin": twin, "exact": is_exact(linear),
                "rounded": rounded(linear),
            }
        )  # fmt: skip
    good = all(c["exact"] and c["rounded"] < _ROUNDED for c in checked)
    with torch.inference_mode():
        ids = torch.arange(16, device=model.device).unsqueeze(0)
        finite = bool(torch.isfinite(model(input_ids=ids).logits).all())
    return {
        "ok": finite and good, "architecture": type(model).__name__, "device": str(model.device),
        "weights": len(linears), "twins": sum(m.twin is not None for m in linears.values()), "twin_gib": twin_bytes(model) /
        GIB, "finite": finite, "checked": checked,
    }  # fmt: skip


def rounded(linear: Int4Linear) -> float:
    """What a twin of 8 bits lost of its weight: rms of the difference over rms of the weight; 0 for any other."""
    if linear.twin is None or linear.twin_scales is None:
        return 0.0
    backend = backend_for(linear.packed.device)
    dense = backend.empty_twin(linear.out_features, linear.in_features, linear.scales.dtype, linear.packed.device)
    backend.expand(linear.kernel_weight, dense)
    error = dequantize(linear.twin, linear.twin_scales) - dense
    return float(error.square().mean().sqrt() / dense.float().square().mean().sqrt().clamp_min(1e-30))


def is_exact(linear: Int4Linear, rows: int = _IDENTITY_ROWS) -> bool:
    """Whether the int4 path gives back, bit for bit, the dense weight that a twin holds, for `rows` input features spread
    over K.
    """
    backend = backend_for(linear.packed.device)
    dtype, device = linear.scales.dtype, linear.packed.device
    n, k = linear.out_features, linear.in_features
    dense = linear.twin if linear.twin_scales is None else None
    if dense is None:
        dense = backend.empty_twin(n, k, dtype, device)
        backend.expand(linear.kernel_weight, dense)
    columns = torch.linspace(0, k - 1, min(rows, k), device=device).long()
    identity = torch.zeros(len(columns), k, dtype=dtype, device=device)
    identity[torch.arange(len(columns), device=device), columns] = 1
    out = backend.int4_linear(identity, linear.kernel_weight, None)
    return torch.equal(out, dense[:, columns].T.to(dtype))
