"""The shell of a page, and what every page has: one file, no network, both themes, the terminal's own cells."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tests.reports import PAGES
from twinweight.page import Page, Section, table
from twinweight.plan import Budget
from twinweight.table import Report, Table

pytest.importorskip("matplotlib")


class Reader(HTMLParser):
    """Text of cells, addresses that would be fetched, and tags that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "data", "xlink:href") and v and not v.startswith("#")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "small":
            self.rows[-1][-1] += "\n"
        self._cell = tag in ("td", "th", "small")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "link", "br"):
            assert self.open.pop() == tag
        self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def page(*parts: Table | str) -> str:
    return Page("<t> & t", "a < b", (Section.of("<s>", *parts),), {"k": "<v>", "none": None}, "run '<x>'").html()


def test_everything_is_escaped() -> None:
    evil = "<script>alert('1')</script>"
    found = page(Table(evil, (evil, "x"), ((evil + "\n" + evil, evil),), (evil,)), evil)
    assert "<script" not in found
    assert found.count("&lt;script&gt;") == 8
    for text in ("&lt;t&gt; &amp; t", "a &lt; b", "&lt;s&gt;", "&lt;v&gt;", "run &#x27;&lt;x&gt;&#x27;"):
        assert text in found
    assert "none" not in Reader(found).rows[-1]


def test_tables_are_marked_up_for_readers() -> None:
    found = table(Table("title", ("name", "n", "why"), (("a\n  b", "1", "c"),), ("note",), left=("why",)))
    assert '<th scope="col" class="left">name</th><th scope="col">n</th><th scope="col" class="left">why</th>' in found
    assert '<th scope="row" class="left">a<small>b</small></th><td>1</td><td class="left">c</td>' in found
    assert "<caption><span>title</span></caption>" in found
    assert found.startswith('<div class="scroll" role="region" aria-label="title"')
    assert found.endswith('<p class="note">note</p>')


def test_texts_in_columns_keep_them() -> None:
    assert "<pre><code>a:\n  b    1\n  c   10</code></pre>" in page("a:\n  b    1\n  c   10")
    assert '<p class="lines">a:\n    b 1</p>' in page("a:\n    b 1")


def test_arithmetic_is_a_list_that_can_wrap() -> None:
    budget = Budget(24 << 30, 20 << 30, kv_floor=4 << 30, reserves=(("<r>", 1 << 30),), weights=4 << 30)
    found = page(f"soft: not all fit\n{budget.arithmetic(16 << 30)}\n{budget.levers(16 << 30)}")
    assert found.count("<pre>") == 1  # the command
    assert '<p class="lines">soft: not all fit</p>\n<dl class="sum">\n<dt>total</dt><dd>24.000 GiB</dd>\n' in found
    assert "<dt>reserve for &lt;r&gt;</dt><dd>-1.000 GiB</dd>" in found
    assert '<dt>all twins need</dt><dd>16.000 GiB</dd>\n</dl>\n<p class="lines">3.400 GiB short; ' in found
    assert found.count("<dt>") == len(budget.arithmetic(0).splitlines())


def test_a_section_without_parts_is_left_out() -> None:
    assert "<h2" not in Page("t", "s", (Section.of("empty", []),), {}, "c").html().split("How it was made")[0].replace(
        '<h2 id="made">', ""
    )


def test_reports_are_taken_apart() -> None:
    inner = Table("t", ("a",), (("b",),))
    assert Section.of("s", Report((inner, "text")), "more").parts == (inner, "text", "more")


@pytest.mark.parametrize("name", PAGES)
def test_every_page_stands_alone(name: str) -> None:
    make, figures = PAGES[name]
    made = make()
    text = made.html()
    read = Reader(text)
    assert read.open == []
    assert read.fetched == ["data:,"]
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert not {"script", "img", "iframe", "object"} & set(read.tags)
    for part in (
        '<meta name="viewport"',
        "prefers-color-scheme: dark",
        "@media print",
        "default-src 'none'",
        "<h1>",
        "How it was made",
    ):
        assert part in text
    assert [read.tags.count(tag) for tag in ("figure", "figcaption", "svg")] == [figures] * 3
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    tables = [part for section in made.sections for part in section.parts if isinstance(part, Table)]
    assert tables
    cells = iter(read.rows)
    for shown in tables:
        assert next(cells) == list(shown.columns)
        for row in shown.rows:
            assert next(cells) == [
                "\n".join(line.strip() for line in cell.split("\n")) if i == 0 else cell for i, cell in enumerate(row)
            ]
