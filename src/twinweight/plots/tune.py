"""`tune`: time against rows."""

from __future__ import annotations

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
)  # fmt: skip

COLOURS = {
    "int4": BLUE, "fused": PURPLE, "stream": GREEN, "twin:bfloat16": RED, "twin:float16": RED, "twin:float32": ORANGE,
    "twin:int8": PINK, "twin:fp8-row": TEAL, "twin:fp8-exact": BROWN,
}  # fmt: skip
_MARKS = "os^Dv<>pX"


def panels(result: dict[str, Any]) -> list[Panel]:
    """A panel a shape."""
    return [_panel(shape) for shape in result["shapes"]]


def best_form(shape: dict[str, Any]) -> str:
    """The twin whose route saves most, or "none" where none saves anything."""
    saved = shape["saved_us"]
    best = max(saved, key=lambda name: saved[name], default="none")
    return best if saved and saved[best] > 0 else "none"


def _panel(shape: dict[str, Any]) -> Panel:
    route = shape["routes"][best_form(shape)]
    title = f"{shape['n']} x {shape['k']}: time against rows M"
    return Panel(title, f"{title}, by path, log-log. Route: {route}.", partial(_draw, shape))


def _draw(shape: dict[str, Any], axes: Any) -> None:
    best = best_form(shape)
    times = {c: [(p["m"], p["us"][c]) for p in shape["points"]] for c in shape["points"][0]["us"]}
    starts = shape["takeovers"][best]
    names = [piece.split(" from ")[0] for piece in shape["routes"][best].split(", ")][1:]
    draw_times(times, axes, list(zip(names, starts, strict=False)))


def draw_times(times: dict[str, list[tuple[int, float]]], axes: Any, takeovers: list[tuple[str, int]] | None = None) -> None:
    """Microseconds by path over rows, log-log; (path, M) of each takeover as a dotted line. Unknown paths are thin and grey."""
    styles = (("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1)), "v"))
    strangers = 0
    for i, (path, points) in enumerate(times.items()):
        label = path.replace("twin:", "twin, ")
        rows, us = zip(*points, strict=True)
        if path in COLOURS:
            axes.loglog(rows, us, label=label, color=COLOURS[path], marker=_MARKS[i % len(_MARKS)], markersize=3)
        else:
            line, mark = styles[strangers % len(styles)]
            strangers += 1
            axes.loglog(rows, us, label=label, color=GREY, marker=mark, markersize=2.5, linewidth=0.9, linestyle=line, zorder=1)
    if takeovers:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.3)  # room above the lines for what marks a takeover
    for name, start in takeovers or ():
        axes.axvline(start, color=ink(), linestyle=":", linewidth=1.0)
        axes.annotate(
            f"{name} from {start}", (start, 1.0), xycoords=("data", "axes fraction"), xytext=(-3, -2), fontsize=8.5,
            textcoords="offset points", rotation=90, ha="right", va="top",
        )  # fmt: skip
    axes.set(xlabel="rows M", ylabel="time")
    axes.set_xscale("log", base=2)
    log_axis(axes.xaxis, lambda m: f"{m:,.0f}" if m >= 1 else "")
    log_axis(axes.yaxis, duration)
    legend_below(axes, columns=2 if len(times) == 4 else 3)
