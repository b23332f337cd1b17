"""`bench`: time to first token and per output token, off and on, with what they varied by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from twinweight.plots.canvas import BLUE, GREEN, GREY, ORANGE, Panel, ink, legend_below, number

COLOURS = {"off": GREY, "on": BLUE, "dense": ORANGE, "int8": GREEN}
_NAMES = {"ttft_ms": "time to first token (TTFT)", "tpot_ms": "time per output token (TPOT)"}


@dataclass(frozen=True)
class Bar:
    """Milliseconds: the median, and the least and the most where they are known."""

    median: float
    least: float | None = None
    most: float | None = None

    @property
    def text(self) -> str:
        return f"{number(self.median)} ms"


@dataclass(frozen=True)
class Group:
    """The bars of one point, by arm. label: what the point is."""

    label: str
    bars: dict[str, Bar]

    @property
    def text(self) -> str:
        found = ", ".join(f"{arm} {bar.text}" for arm, bar in self.bars.items())
        return f"{self.label}: {found}" if self.label else found


def panels(result: dict[str, Any]) -> list[Panel]:
    """TTFT and TPOT, from what either engine's `bench` returns."""
    found = []
    for key, name in _NAMES.items():
        groups = groups_of(result["records"], key) if "records" in result else _of_arms(result["arms"], key)
        if groups:
            parts = (
                f"{g.label + ': ' if g.label else ''}" + ", ".join(f"{a} {b.text}" for a, b in g.bars.items()) for g in groups
            )
            found.append(Panel(name, f"{name}: {'; '.join(parts)}.", partial(draw, groups), height(groups)))
    return found


def _of_arms(arms: dict[str, Any], key: str) -> list[Group]:
    known = {arm: found[key] for arm, found in arms.items() if found[key] is not None}
    return [Group("", {a: Bar(t["median"], t["min"], t["max"]) for a, t in known.items()})] if known else []


def groups_of(records: Sequence[dict[str, Any]], key: str) -> list[Group]:
    """A group a point that was measured off and on, from the records of `bench --engine vllm`."""
    points: dict[tuple[int, int], dict[str, Bar]] = {}
    for r in records:
        if r["mode"] in COLOURS:
            span = r.get(f"{key}_range") or (None, None)
            points.setdefault((r["prompt_tokens"], r["concurrency"]), {})[r["mode"]] = Bar(r[key], *span)
    both = {
        p: {arm: bars[arm] for arm in COLOURS if arm in bars}
        for p, bars in sorted(points.items())
        if {"off", "on"} <= set(bars)
    }
    return [Group(f"{prompt:,} x {at_once}", bars) for (prompt, at_once), bars in both.items()]


def height(groups: Sequence[Group]) -> float:
    """Inches that `draw` needs."""
    return (1.05 if len(groups) > 1 else 0.75) + 0.3 * sum(len(g.bars) for g in groups) + 0.12 * len(groups)


def draw(groups: Sequence[Group], axes: Any) -> None:
    """Bars with least and most as whiskers. Several points share an axis as multiples of their off, with the time beside."""
    relative = len(groups) > 1
    at, ticks, reach = 0.0, [], 0.0
    for group in groups:
        unit = group.bars["off"].median if relative else 1.0
        first = at
        for arm, bar in group.bars.items():
            end = max(bar.median, bar.most or 0.0) / unit
            axes.barh(at, bar.median / unit, height=0.8, color=COLOURS[arm], label=arm if group is groups[0] else None)
            if bar.least is not None and bar.most is not None:
                span = [[(bar.median - bar.least) / unit], [(bar.most - bar.median) / unit]]
                axes.errorbar(bar.median / unit, at, xerr=span, color=ink(), capsize=2.5, linewidth=1.0)
            axes.annotate(
                bar.text,
                (max(end, 1.0) if relative else end, at),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
            ticks.append((at, arm))
            reach = max(reach, end)
            at += 1.0
        if relative:
            ticks[-len(group.bars) :] = [((first + at - 1.0) / 2, group.label)]
        at += 0.4
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    axes.set_xlim(0, reach * 1.22)
    axes.set_ylim(at - 0.8, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if relative:
        axes.axvline(1.0, color=ink(), linestyle=":", linewidth=1.0, zorder=0.5)
        axes.set(xlabel="time over that of off, the less the better", ylabel="prompt tokens x requests at once")
        legend_below(axes, columns=len(groups[0].bars))
    else:
        axes.set(xlabel="ms, the less the better")
