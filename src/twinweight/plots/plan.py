"""`plan`: what fills the memory of one GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from twinweight.plots.canvas import BLUE, GREEN, GREY, RED, Panel, ink, legend_below
from twinweight.table import GIB

_COLOURS = {"weights": BLUE, "reserves": GREY, "twins": RED, "KV cache": GREEN}


def panels(result: dict[str, Any]) -> list[Panel]:
    """One panel, a bar a mode."""
    modes = result["modes"]
    title = f"{result['model']}: memory of {'each' if result['tp'] > 1 else 'one'} {result['gpu']} by mode"
    parts = [f"{mode} {_gib(m['twin_bytes'])} of twins and {m['kv_tokens']:,} KV tokens" for mode, m in modes.items()]
    return [Panel(title, f"{title}: {'; '.join(parts)}.", partial(_draw, result), 1.5 + 0.55 * len(modes))]


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def _draw(result: dict[str, Any], axes: Any) -> None:
    budget, modes = result["budget"], dict(reversed(result["modes"].items()))
    labels = []
    for at, (mode, found) in enumerate(modes.items()):
        left = 0.0
        lines = ("activations", "graphs and libraries", *(["scratch of stream"] if mode != "off" else []))
        sizes = {
            "weights": budget["weights"], "reserves": sum(budget[line] for line in lines), "twins": found["twin_bytes"],
            "KV cache": found["kv_bytes"],
        }  # fmt: skip
        for part, nbytes in sizes.items():
            wide = nbytes / GIB
            axes.barh(at, wide, left=left, height=0.62, color=_COLOURS[part], label=part if at == 0 else None)
            if nbytes > 0.09 * budget["total"]:
                axes.text(left + wide / 2, at, f"{wide:.1f}", ha="center", va="center", fontsize=9, color="white")
            left += wide
        labels.append(f"{mode}\n" + (f"{found['kv_tokens']:,} KV" if found["fits"] else "does not fit"))
    axes.axvline(budget["total"] / GIB, color=ink(), linewidth=1.6)
    usable = (budget["total"] - budget["kept free"]) / GIB
    axes.axvline(usable, color=ink(), linestyle="--", linewidth=1.2)
    axes.margins(x=0.04)
    axes.set_yticks(range(len(modes)), labels)
    axes.set(xlabel="GiB (dashed: what may be used, solid: all there is)")
    axes.grid(axis="y", visible=False)
    legend_below(axes, columns=4)
