"""Every page in headless Chromium: silent, alone, and as wide as a screen, in light and in dark, on a desk and on a phone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.reports import PAGES

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: `make browser` installs it where apt-get and root are"
)

# Text that leaves its drawing or another's, in CSS pixels, by more than a pixel; labels of one axis that overlap.
_OUTSIDE = """[...document.querySelectorAll('svg')].flatMap(s => { const b = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
    return r.left < b.left - 1 || r.right > b.right + 1 || r.top < b.top - 1 || r.bottom > b.bottom + 1 })
    .map(t => t.textContent) })"""
_OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(s => { const ts = [...s.querySelectorAll('text')]
    .map(t => [t.textContent, t.getBoundingClientRect()]); const out = [];
  ts.forEach(([a, p], i) => ts.slice(i + 1).forEach(([b, q]) => {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left), y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 2 && y > 3) out.push(a + ' / ' + b) })); return out })"""
_CUT = """[...document.querySelectorAll('pre, dl')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_and_fits(browser: Browser, tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.html"
    file.write_text(PAGES[name][0]().html(), encoding="utf-8")
    grounds = {}
    for width in (1280, 390):
        for dark in (False, True):
            browser.open(file, width=width, dark=dark)
            assert browser.value("document.documentElement.scrollWidth <= innerWidth"), (width, dark)
            assert browser.value("innerWidth") == width
            assert browser.value("document.querySelectorAll('figure svg').length") == PAGES[name][1]
            assert browser.value(_OUTSIDE) == []
            assert browser.value(_OVERLAPS) == []
            assert browser.value(_CUT) == []
            ground, ink, text = (browser.value(f"getComputedStyle({e}).{p}") for e, p in (
                ("document.body", "backgroundColor"), ("document.body", "color"),
                ("document.querySelector('svg text')", "fill"),
            ))  # fmt: skip
            assert text == ink != ground  # drawings take the page's ink
            grounds[dark] = ground
            shot = tmp_path / "shot.png"
            browser.screenshot(shot)
            assert struct.unpack(">I", shot.read_bytes()[16:20])[0] in (width, 2 * width, width - 15)
            assert browser.complaints() == []
            assert set(browser.requests()) == {file.as_uri()}
    assert grounds[False] != grounds[True]


def test_a_long_command_wraps(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "long.html"
    made = PAGES["plan-too-small"][0]()
    file.write_text(replace(made, command=f"twinweight plan {'model' * 60} --json {'x' * 300} --tp 1").html(), encoding="utf-8")
    for width in (1280, 390):
        browser.open(file, width=width)
        assert browser.value(_CUT) == []
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")


def test_what_is_wrong_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<body><div style='width: 3000px'>x</div><img src='none.png'><script>console.error('no'); nothing()</script>"
        "<pre style='width: 40px'>a command that is longer</pre>"
        "<svg width=50 height=20><text x=40 y=15>outside</text><text x=40 y=15>outside</text></svg>"
    )
    browser.open(file, width=390)
    assert browser.value("document.documentElement.scrollWidth > innerWidth") or browser.value("innerWidth") > 390
    assert len(browser.complaints()) >= 2
    assert len(browser.requests()) == 2
    assert browser.value(_OUTSIDE)
    assert browser.value(_OVERLAPS)
    assert browser.value(_CUT)
