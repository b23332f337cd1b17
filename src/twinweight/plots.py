"""Plots of `tune` and `plan`, from the dictionaries that `--json` writes. matplotlib is imported where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinweight.errors import ConfigError

_GIB = 1 << 30
_COLOURS = {
    "int4": "#1f77b4", "fused": "#9467bd", "stream": "#2ca02c", "twin:bfloat16": "#d62728", "twin:float16": "#d62728",
    "twin:float32": "#ff7f0e", "twin:int8": "#e377c2", "twin:fp8-row": "#e377c2", "twin:fp8-exact": "#8c564b",
}  # fmt: skip


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib (pip install 'twinweight[report]')") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def tune_plot(result: dict[str, Any], file: Path) -> None:
    """Time against rows, log-log, a panel a shape and a line a path; takeovers of the best twin's route are marked."""
    plt = _pyplot()
    shapes = result["shapes"]
    columns = min(2, max(1, len(shapes)))
    rows = -(-len(shapes) // columns) or 1
    figure, panels = plt.subplots(rows, columns, figsize=(6 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for panel in list(panels.flat)[len(shapes) :]:
        panel.axis("off")
    for panel, shape in zip(panels.flat, shapes, strict=False):
        ms = [p["m"] for p in shape["points"]]
        for choice in shape["points"][0]["us"]:
            panel.loglog(
                ms, [p["us"][choice] for p in shape["points"]], marker=".", label=choice.replace("twin:", "twin, "),
                color=_COLOURS.get(choice),
            )  # fmt: skip
        saved = shape["saved_us"]
        best = max(saved, key=lambda name: saved[name]) if saved else "none"
        for start in shape["takeovers"][best]:
            panel.axvline(start, color="grey", linestyle=":")
            panel.annotate(f"M={start}", (start, panel.get_ylim()[0]), fontsize=8, xytext=(2, 2), textcoords="offset points")
        panel.set(title=f"{shape['n']} x {shape['k']}", xlabel="rows M", ylabel="time (us)")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=8)
    figure.suptitle(result["device"]["name"])
    _save(plt, figure, file)


def plan_plot(result: dict[str, Any], file: Path) -> None:
    """Memory of one GPU, a bar a mode: weights, twins, KV cache, reserves, what is kept free."""
    plt = _pyplot()
    budget, modes = result["budget"], result["modes"]
    figure, panel = plt.subplots(figsize=(7, 1.2 + 0.7 * len(modes)), layout="constrained")
    for at, (mode, found) in enumerate(reversed(modes.items())):
        left = 0.0
        lines = ("activations", "graphs and libraries", *(["scratch of stream"] if mode != "off" else []))
        reserves = sum(budget[line] for line in lines)
        parts = [
            ("weights", budget["weights"], "#1f77b4"), ("reserves", reserves, "#8c8c8c"),
            ("twins", found["twin_bytes"], "#d62728"), ("KV cache", found["kv_bytes"], "#2ca02c"),
        ]  # fmt: skip
        for label, nbytes, colour in parts:
            panel.barh(at, nbytes / _GIB, left=left, color=colour, label=label if at == 0 else None)
            left += nbytes / _GIB
        text = f"{found['kv_tokens']:,} KV tokens" if found["fits"] else "does not fit"
        panel.annotate(text, (budget["total"] / _GIB, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.axvline(budget["total"] / _GIB, color="black")
    panel.axvline((budget["total"] - budget["kept free"]) / _GIB, color="black", linestyle=":")
    panel.set_yticks(range(len(modes)), list(reversed(modes)))
    panel.set(xlabel="GiB of one GPU (dotted: what may be used)", title=f"{result['model']}, {result['tp']} x {result['gpu']}")
    panel.margins(x=0.25)
    panel.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    _save(plt, figure, file)


def _save(plt: Any, figure: Any, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
    finally:
        plt.close(figure)
