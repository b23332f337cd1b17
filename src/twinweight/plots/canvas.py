"""From panels to a file or to an SVG that lives inside a page. matplotlib is imported where it is used."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinweight.errors import ConfigError

WIDTH = 4.7
"""Inches of one panel: at this width its text is as large on a phone as the text around it."""
INK = "#24292f"
_PAGE_INK = "#010203"  # stands for the page's own colour of text, which a drawing inside it takes
# Each has a contrast of 3 and more on white and on a dark page (tests/plots/test_canvas.py).
BLUE, ORANGE, GREEN, RED = "#3b82d6", "#d9731a", "#27966b", "#dd4f57"
PURPLE, BROWN, TEAL, PINK, GREY = "#9a6bd0", "#a8744a", "#1f93a8", "#cf5fa5", "#858b94"


FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of the plots that commands write; matplotlib has more with some libraries, and fails late at some of them."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. title: what it shows, in a line. alt: the same for who cannot see it, with the figures that matter."""

    title: str
    alt: str
    draw: Callable[[Any], None]
    height: float = 3.4


def require() -> None:
    """Raise ConfigError where plots cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plots need matplotlib (pip install 'twinweight[report]')") from error


def save(panels: Sequence[Panel], file: Path, title: str | None = None, columns: int = 2) -> None:
    """Write panels into one file, side by side, on white. Raises ConfigError where it cannot be written."""
    require()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(columns, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    heights = [max((p.height for p in panels[r * columns : (r + 1) * columns]), default=1.0) for r in range(rows)]
    with mpl.rc_context(_settings(INK, "twinweight")):
        size = (WIDTH * columns, sum(heights) + 0.4 * rows + (0.3 if title else 0))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title, fontsize="medium")
        if title:
            figure.suptitle(title)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=120, metadata=metadata)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write {file}: {error}") from error


def svg(panel: Panel, prefix: str) -> str:
    """A panel as an <svg> element to stand inside a page: its text is text, its ink the page's, its ids begin with `prefix`."""
    require()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = io.StringIO()
    with mpl.rc_context(_settings(_PAGE_INK, prefix)):
        figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
        panel.draw(figure.subplots())
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)  # a page has these rules for all
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(_PAGE_INK, "currentColor")
    text = re.sub(r'font-family: [^;"]*; ?', "", text)  # so is the font
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r"\s*\n", "\n", text)
    box, label = re.search(r'viewBox="[^"]*"', text), html.escape(panel.alt)
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg {box[0] if box else ""} role="img" aria-label="{label}">', text, count=1)


def _settings(ink: str, salt: str) -> Any:
    return {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "font.size": 10.0, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.18, "grid.color": ink, "grid.linewidth": 0.8,
        "legend.frameon": False, "legend.fontsize": 9.0, "lines.linewidth": 1.8, "lines.markersize": 5.0,
        "xtick.labelsize": 9.0, "ytick.labelsize": 9.0, "svg.fonttype": "none", "svg.hashsalt": salt,
        "axes.linewidth": 0.8, "xtick.minor.size": 0, "ytick.minor.size": 0,
    }  # fmt: skip


# --- what panels share ---


def ink() -> str:
    """The colour of text in the drawing at hand."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def legend_below(axes: Any, columns: int = 3) -> None:
    """The legend under the axes and their label, where no line runs."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -0.46, axes.figure.dpi_scale_trans)  # inches: ticks and a label
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), bbox_transform=below, borderaxespad=0.0, ncols=columns)


def log_axis(axis: Any, text: Callable[[float], str]) -> None:
    """Plain words at the powers of ten: exponents need glyphs that a page may not have."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """A number in few digits: 1,234, 12.3, 0.05."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def duration(us: float) -> str:
    """Microseconds in the unit that suits them."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{number(us / size)} {unit}"
    return f"{number(us)} us"
