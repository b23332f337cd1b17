"""Two traces, op by op: what got faster or slower, what appeared, what vanished."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

SAME = 0.03
"""A change of less than this share counts as none: the larger ops of two equal vLLM runs on an H200 differed by up to 2 %."""


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The difference of two results of `summarise`: {"kinds", "ops", "linears"}, rows sorted by the time they gained or lost.

    "linears" has a row for each shape and phase, whatever op computes it, which "ops_before" and "ops_after" name.
    A row: the key ("op", "shape", "kind", "phase", or "kind" and "phase" alone), time in microseconds and calls before and
    after, "speedup" (time before over time after, None where one is missing) and "change": "faster", "slower", "same",
    "appeared" or "vanished".
    """
    return {
        "before": before["trace"],
        "after": after["trace"],
        "kinds": _rows(before["kinds"], after["kinds"], ("kind", "phase")),
        "ops": _rows(before["ops"], after["ops"], ("op", "shape", "kind", "phase")),
        "linears": _linear_shapes(before["ops"], after["ops"]),
    }


def swaps(diff: dict[str, Any]) -> list[str]:
    """What each phase does with its int4 weights, before and after, a sentence a phase: the proof that is looked for."""
    out = []
    for phase in ("prefill", "decode"):
        sides = [_linears(diff["ops"], phase, side) for side in ("before", "after")]
        if any(sides):
            out.append(f"{phase}: {sides[0] or 'no linear'} before, {sides[1] or 'no linear'} after")
    return out


def _linears(rows: Sequence[dict[str, Any]], phase: str, side: str) -> str:
    """The linears of a phase by op: "96 x aten::mm (gemm)", the most time first."""
    calls: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for row in rows:
        if row["phase"] == phase and row["kind"] in ("gemm", "w4a16") and row[f"calls_{side}"]:
            entry = calls[row["op"], row["kind"]]
            entry[0] += row[f"calls_{side}"]
            entry[1] += row[f"time_us_{side}"]
    ranked = sorted(calls.items(), key=lambda item: -item[1][1])
    return ", ".join(f"{int(count)} x {op} ({kind})" for (op, kind), (count, _) in ranked)


def _linear_shapes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first, second = ([r for r in rows if r["kind"] in ("gemm", "w4a16") and r["shape"]] for rows in (before, after))
    out = _rows(first, second, ("shape", "phase"))
    for row in out:
        for name, rows in (("ops_before", first), ("ops_after", second)):
            row[name] = sorted({r["op"] for r in rows if (r["shape"], r["phase"]) == (row["shape"], row["phase"])})
    return out


def _rows(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], key: tuple[str, ...]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, ...], dict[str, float]] = {}
    for side, rows in (("before", before), ("after", after)):
        for row in rows:
            found = sums.setdefault(
                tuple(row[k] for k in key), {"time_us_before": 0.0, "time_us_after": 0.0, "calls_before": 0, "calls_after": 0}
            )
            found[f"time_us_{side}"] = round(found[f"time_us_{side}"] + row["time_us"], 3)
            found[f"calls_{side}"] += row["calls"]
    out = [dict(zip(key, values, strict=True)) | found | _change(found) for values, found in sums.items()]
    return sorted(out, key=lambda r: -abs(r["time_us_after"] - r["time_us_before"]))


def _change(found: dict[str, float]) -> dict[str, Any]:
    a, b = found["time_us_before"], found["time_us_after"]
    if not found["calls_before"] or not found["calls_after"]:
        return {"speedup": None, "change": "vanished" if found["calls_before"] else "appeared"}
    speedup = round(a / b, 4) if b else None
    word = "same" if abs(a - b) <= SAME * max(a, b) else "faster" if b < a else "slower"
    return {"speedup": speedup, "change": word}
