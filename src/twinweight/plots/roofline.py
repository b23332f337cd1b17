"""`roofline`: ops under the roof, and where the time went."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from twinweight.plots.canvas import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    TEAL,
    Panel,
    duration,
    ink,
    legend_below,
    log_axis,
    number,
)  # fmt: skip

_KINDS = {"w4a16": BLUE, "gemm": RED, "attention": GREEN, "moe": PINK, "norm": PURPLE, "elementwise": TEAL, "sampling": BROWN}
_PHASES = {"prefill": ORANGE, "decode": BLUE, "other": GREY}
_MARKS = {"prefill": "o", "decode": "s"}
_MOST = 8
_DTYPES = ("bfloat16", "float16", "float32")


def panels(result: dict[str, Any]) -> list[Panel]:
    """Of one trace: ops under the roof, and shares by kind. Of two: each under the roof, and time by kind before and after."""
    if "diff" not in result:
        return [*_scatter(result), *([_shares(result)] if result["kinds"] else [])]
    sides = ("before", "after")
    return [*(p for side in sides for p in _scatter(result[side])), *([_changes(result)] if result["diff"]["kinds"] else [])]


# --- under the roof ---


def _scatter(result: dict[str, Any]) -> list[Panel]:
    ops = [r for r in result["ops"] if r["flops"] and r["bytes"] and r["tflops"]]
    if not ops:
        return []
    shown = f"{sum(r['share'] for r in ops) * 100:.0f} % of the time"
    title = f"{result['trace']}: ops {'under the roof' if result['gpu'] else 'by FLOPs a byte'} ({shown})"
    top = max(ops, key=lambda r: r["time_us"])
    alt = (
        f"FLOP/s against FLOPs a byte, log-log, of {len(ops)} ops, {shown}; most of it is in "
        f"{top['op']} {top['shape']} at {top['tflops']:.3g} TFLOP/s."
    )
    return [Panel(title, alt, partial(_draw_scatter, result["gpu"], ops), 3.9)]


def _draw_scatter(roof: dict[str, Any] | None, ops: list[dict[str, Any]], axes: Any) -> None:
    spots: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in ops:
        spots[row["kind"] if row["kind"] in _KINDS else "other", row["phase"]].append(row)
    for (kind, phase), rows in sorted(spots.items()):
        axes.scatter(
            [r["flops"] / r["bytes"] for r in rows], [r["tflops"] for r in rows], marker=_MARKS.get(phase, "^"), alpha=0.9,
            s=[16 + 500 * r["share"] for r in rows], color=_KINDS.get(kind, GREY), linewidth=0, label=f"{kind}, {phase}",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    if roof is not None:
        _draw_roof(roof, axes)
    log_axis(axes.xaxis, number)
    log_axis(axes.yaxis, number)
    legend_below(axes, columns=2)
    for handle in axes.get_legend().legend_handles:
        handle.set_sizes([36])


def _draw_roof(roof: dict[str, Any], axes: Any) -> None:
    low, high = axes.get_xlim()
    dtype = next((d for d in _DTYPES if d in roof["matrix"]), next(iter(roof["matrix"])))
    slope, peak = roof["bandwidth"] / 1e12, roof["matrix"][dtype] / 1e12
    ridge = peak / slope
    high = max(high, 4 * ridge)
    axes.plot([low, ridge, high], [low * slope, peak, peak], color=ink(), linewidth=1.4, zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(top=peak * 4)
    axes.annotate(
        f"{roof['name']}: {number(peak)} TFLOP/s {dtype}, {number(slope)} TB/s", (1.0, peak), fontsize=8.5, ha="right",
        xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
    )  # fmt: skip


# --- where the time went ---


def _shares(result: dict[str, Any]) -> Panel:
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for row in result["kinds"]:
        kinds[row["kind"]][row["phase"]] = row["share"] * 100
    ranked = sorted(kinds.items(), key=lambda item: -sum(item[1].values()))[:_MOST]
    title = f"{result['trace']}: share of the time by kind"
    alt = f"{title}: " + ", ".join(f"{kind} {sum(parts.values()):.1f} %" for kind, parts in ranked) + "."
    return Panel(title, alt, partial(_draw_shares, ranked), 1.4 + 0.3 * len(ranked))


def _draw_shares(ranked: list[tuple[str, dict[str, float]]], axes: Any) -> None:
    named: set[str] = set()
    for at, (_, parts) in enumerate(ranked):
        left = 0.0
        for phase, share in sorted(parts.items(), key=lambda item: list(_PHASES).index(item[0])):
            axes.barh(at, share, left=left, height=0.7, color=_PHASES[phase], label=None if phase in named else phase)
            named.add(phase)
            left += share
        axes.annotate(f"{left:.1f} %", (left, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, max(sum(parts.values()) for _, parts in ranked) * 1.15)
    axes.set(xlabel="% of the time")
    _rows(axes, [kind for kind, _ in ranked])


def _changes(result: dict[str, Any]) -> Panel:
    rows = sorted(result["diff"]["kinds"], key=lambda r: -max(r["time_us_before"], r["time_us_after"]))[:_MOST]
    title = "time by kind, before and after"
    parts = (f"{r['kind']}, {r['phase']} {duration(r['time_us_before'])} to {duration(r['time_us_after'])}" for r in rows)
    return Panel(title, f"{title}: {'; '.join(parts)}.", partial(_draw_changes, rows), 1.3 + 0.45 * len(rows))


def _draw_changes(rows: list[dict[str, Any]], axes: Any) -> None:
    most = max(max(r["time_us_before"], r["time_us_after"]) for r in rows)
    for at, row in enumerate(rows):
        for side, offset, colour in (("before", -0.2, GREY), ("after", 0.2, BLUE)):
            us = row[f"time_us_{side}"]
            axes.barh(at + offset, us / 1e3, height=0.38, color=colour, label=side if at == 0 else None)
            text = duration(us) if us else "none"
            axes.annotate(text, (us / 1e3, at + offset), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, most / 1e3 * 1.22)
    axes.set(xlabel="ms")
    _rows(axes, [f"{r['kind']},\n{r['phase']}" for r in rows])


def _rows(axes: Any, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right")
