"""From calls to the table: a row for each op, shape and phase, held against the roof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from twinweight.gpus import Gpu, same
from twinweight.roofline.attributing import Attributed
from twinweight.roofline.records import Call, Work

HOW = ("launch", "graph", "name", "none")


def summarise(
    found: Sequence[Attributed], roof: Gpu | None, *, kind: str = "all", phase: str = "all", top: int | None = None
) -> dict[str, Any]:
    """The result of `roofline` for one trace, or for the ranks of one run together.

    {"trace", "attributed": share of the device time that belongs to an op or a known kernel, "attribution": share by `HOW`,
    "gpu", "on": "gpu" or "cpu", "device_time_us", "phases", "kinds", "ops"}. Rows: time in microseconds and flops and bytes are
    sums over calls; flops, bytes and the rates are None where they are not known; roof_pct is the least time that the roof
    allows over the time taken, bound what sets that least time ("compute" or "memory"). Shares are of the time in the chosen
    phase.
    """
    calls = [c for a in found for c in a.calls]
    total = sum(c.time for c in calls)
    chosen = [c for c in calls if phase in ("all", c.phase)]
    time = sum(c.time for c in chosen)
    by_op, by_kind = defaultdict(list), defaultdict(list)
    for call in chosen:
        by_op[call.op, _shape(call), call.kind, call.phase, call.path].append(call)
        by_kind[call.kind, call.phase].append(call)
    ops = [
        {"op": op, "shape": shape, "kind": k, "phase": p, "path": path} | _row(group, time, roof)
        for (op, shape, k, p, path), group in by_op.items()
        if kind in ("all", k)
    ]
    kinds = [{"kind": k, "phase": p} | _row(group, time, roof) for (k, p), group in by_kind.items() if kind in ("all", k)]
    ops.sort(key=lambda r: -float(r["time_us"]))
    device = next((a.device for a in found if a.device), "")
    how = {h: _share(sum(c.time for c in calls if c.how == h), total) for h in HOW}
    return {
        "trace": ", ".join(a.name for a in found),
        "attributed": round(1.0 - how["none"], 6) if total else 0.0,
        "attribution": how,
        "gpu": _gpu(roof),
        "device": device,
        "other_device": roof is not None and bool(device) and not same(roof, device),
        "on": "gpu" if any(a.gpu for a in found) else "cpu",
        "device_time_us": round(total, 3),
        "phases": _phases(found),
        "kinds": sorted(kinds, key=lambda r: -float(r["time_us"])),
        "ops": ops[:top],
        "left_out": max(0, len(ops) - top) if top is not None else 0,
    }


def least_time(work: Work, roof: Gpu) -> tuple[float, str]:
    """Seconds that the roof allows for one call at least, and what binds it: "compute" or "memory"."""
    peak = roof.peak(work.dtype) if work.dtype else None
    compute = (work.needed or 0) / peak if peak else 0.0
    memory = (work.bytes or 0) / roof.bandwidth
    return (compute, "compute") if compute > memory else (memory, "memory")


def _row(calls: Iterable[Call], total: float, roof: Gpu | None) -> dict[str, Any]:
    calls = list(calls)
    time = sum(c.time for c in calls)
    counted = [c for c in calls if not c.part]
    works = [c.work for c in counted if c.work is not None and c.work.bytes is not None]
    # Rates hold for the calls whose work is known; with their other kernels.
    known = sum(c.time for c in calls if c.work is not None and c.work.bytes is not None)
    flops = sum(w.flops or 0 for w in works) if works else None
    moved = sum(w.bytes or 0 for w in works) if works else None
    row: dict[str, Any] = {
        "calls": len(counted), "time_us": round(time, 3), "share": _share(time, total), "flops": flops, "bytes": moved,
        "tflops": None, "tbps": None, "roof_pct": None, "bound": None,
    }  # fmt: skip
    if flops is None or moved is None or not known:
        return row
    row |= {"tflops": _digits(flops / known / 1e6), "tbps": _digits(moved / known / 1e6)}
    if roof is not None:
        limits = [least_time(w, roof) for w in works]
        least = sum(seconds for seconds, _ in limits)
        if least > 0:
            compute = sum(seconds for seconds, bound in limits if bound == "compute")
            row |= {"roof_pct": round(100e6 * least / known, 2), "bound": "compute" if 2 * compute > least else "memory"}
    return row


def _shape(call: Call) -> str:
    return call.work.shape if call.work else ""


def _share(part: float, total: float) -> float:
    return round(part / total, 6) if total else 0.0


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _gpu(roof: Gpu | None) -> dict[str, Any] | None:
    return None if roof is None else asdict(roof)


def _phases(found: Sequence[Attributed]) -> list[dict[str, Any]]:
    """Steps of the first rank, and the device time of all, a phase."""
    out = []
    for phase in ("prefill", "decode", "other"):
        time = sum(c.time for a in found for c in a.calls if c.phase == phase)
        steps = [s for s in found[0].steps.steps if s.phase == phase] if found else []
        if time or steps:
            rows = sorted({s.rows for s in steps if s.rows})
            out.append({"phase": phase, "steps": len(steps), "rows": rows, "time_us": round(time, 3)})
    return out
