"""One self-contained page: a summary, sections of tables and figures, the environment and the command. Nothing is fetched."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from twinweight.plots.canvas import Panel, svg
from twinweight.table import Report, Table

Part = Table | Panel | str
_COLUMNS = re.compile(r"\S {3,}\S")  # a text that stands in columns needs letters of one width
_SUM = re.compile(r"\s+(\S.*?) {3,}(-?[\d,.]+ GiB)")  # a line of `Budget.arithmetic`: what it is, and how much


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. Panels in a row share the width there is; lines of a text stay lines."""

    title: str
    parts: tuple[Part, ...]

    @staticmethod
    def of(title: str, *parts: Part | Report | Iterable[Panel]) -> Section:
        """A section of parts, reports being taken apart."""
        flat: list[Part] = []
        for part in parts:
            if isinstance(part, Table | Panel | str):
                flat.append(part)
            else:
                flat.extend(part.parts if isinstance(part, Report) else part)
        return Section(title, tuple(flat))


@dataclass(frozen=True)
class Page:
    """What a page says. summary: one plain sentence. command: as it would be typed again."""

    title: str
    summary: str
    sections: tuple[Section, ...]
    environment: Mapping[str, object]
    command: str

    def html(self) -> str:
        """The page. Raises ConfigError where it has panels and plots cannot be drawn."""
        sections = "\n".join(_section(section, f"s{i}") for i, section in enumerate(self.sections) if section.parts)
        rows = tuple((str(name), str(value)) for name, value in self.environment.items() if value is not None)
        facts = table(Table("", ("environment", ""), rows, left=("",))) if rows else ""
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{html.escape(self.title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(self.title)}</h1>
<p class="summary">{html.escape(self.summary)}</p>
</header>
{sections}
<section aria-labelledby="made">
<h2 id="made">How it was made</h2>
<pre><code>{html.escape(self.command)}</code></pre>
{facts}
</section>
</main>
</body>
</html>
"""


def table(found: Table) -> str:
    """A table that scrolls inside its own box. A second line of a cell is small print."""
    head = "".join(f'<th scope="col"{_align(found, i)}>{html.escape(c)}</th>' for i, c in enumerate(found.columns))
    body = "\n".join("<tr>" + "".join(_cell(found, i, text) for i, text in enumerate(row)) + "</tr>" for row in found.rows)
    title = f"<caption><span>{html.escape(found.title)}</span></caption>" if found.title else ""
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in found.notes)
    rows = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    label = html.escape(found.title or found.columns[0])
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{title}\n{rows}</table></div>{notes}'


def figure(panel: Panel, prefix: str) -> str:
    """A plot with its title. prefix: what no other figure of the page has."""
    return f"<figure>\n{svg(panel, prefix)}\n<figcaption>{html.escape(panel.title)}</figcaption>\n</figure>"


def _section(section: Section, prefix: str) -> str:
    out = []
    for drawn, parts in groupby(enumerate(section.parts), key=lambda item: isinstance(item[1], Panel)):
        each = [figure(p, f"{prefix}f{i}") if isinstance(p, Panel) else _words(p) for i, p in parts]
        out.append(f'<div class="figures">\n{"".join(each)}\n</div>' if drawn else "\n".join(each))
    title = f'<h2 id="{prefix}">{html.escape(section.title)}</h2>'
    return f'<section aria-labelledby="{prefix}">\n{title}\n' + "\n".join(out) + "\n</section>"


def _words(part: Table | str) -> str:
    if isinstance(part, Table):
        return table(part)
    blocks = groupby(part.split("\n"), key=lambda line: _SUM.fullmatch(line) is not None)
    return "\n".join(_sum(lines) if sums else _lines("\n".join(lines)) for sums, lines in blocks)


def _lines(text: str) -> str:
    if _COLUMNS.search(text):
        return f"<pre><code>{html.escape(text)}</code></pre>"
    return f'<p class="lines">{html.escape(text)}</p>'


def _sum(lines: Iterable[str]) -> str:
    """What stands in two columns on a terminal; on a phone the first may wrap."""
    found = [match.groups() for line in lines if (match := _SUM.fullmatch(line))]
    pairs = (f"<dt>{html.escape(what)}</dt><dd>{html.escape(much)}</dd>" for what, much in found)
    return '<dl class="sum">\n' + "\n".join(pairs) + "\n</dl>"


def _align(found: Table, i: int) -> str:
    return ' class="left"' if found.aligned(i) == "left" else ""


def _cell(found: Table, i: int, text: str) -> str:
    first, _, rest = text.partition("\n")
    inner = html.escape(first) + (f"<small>{html.escape(rest.strip())}</small>" if rest else "")
    return f'<th scope="row"{_align(found, i)}>{inner}</th>' if i == 0 else f"<td{_align(found, i)}>{inner}</td>"


_CSS = """
:root { --ground: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d5dae0; --box: #f5f7f9; --mark: #2f6fc4; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0f1318; --ink: #e4e8ed; --soft: #9ba5b0; --line: #313942; --box: #181e25; --mark: #6ea8f0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.summary { font-size: 1.125rem; margin: 0; max-width: 52rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; align-items: start; }
figure { margin: 0; min-width: 0; max-width: 36rem; display: flex; flex-direction: column-reverse; gap: .5rem; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .9375rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font-family: "DejaVu Sans", Verdana, sans-serif; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll:focus-visible { outline: 2px solid var(--mark); }
table { border-collapse: collapse; min-width: min(100%, 28rem); font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: .9375rem; padding: .25rem 0 .5rem; }
caption span { display: block; max-width: calc(100vw - 2rem); overflow-wrap: anywhere; }
th, td { padding: .3rem 1.25rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: .25rem; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
tbody th { font-weight: 500; }
.left { text-align: left; }
td.left { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
small { display: block; color: var(--soft); font-size: .8125rem; font-weight: 400; }
.lines, .note { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); font-size: .9375rem; max-width: 60rem; margin: .75rem 0; }
.note { font-size: .875rem; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: .375rem; padding: .75rem 1rem; margin: .75rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.sum { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .15rem 1.25rem; max-width: 36rem; margin: .75rem 0; padding: 0 .25rem; font-size: .875rem; font-variant-numeric: tabular-nums; }
.sum dt { overflow-wrap: anywhere; }
.sum dd { margin: 0; text-align: right; white-space: nowrap; align-self: end; }
code { font: .875rem/1.5 ui-monospace, monospace; }
@media (max-width: 40rem) { th, td { padding-right: .75rem; } }
@media print {
  :root { --ground: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --box: #ffffff; --mark: #000000; }
  main { max-width: none; padding: 0; }
  .figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
  .scroll { overflow: visible; }
  table { font-size: .7rem; min-width: 0; }
  tbody th { white-space: normal; overflow-wrap: anywhere; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""  # noqa: E501 - a rule a line
