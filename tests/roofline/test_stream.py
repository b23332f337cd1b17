"""The streaming reader: every way a file may be cut into windows, and every way it may be broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from twinweight.errors import ConfigError, TraceError
from twinweight.roofline import stream
from twinweight.roofline.reading import read

EVENTS = [
    {"ph": "X", "name": 'quotes " and \\ and { [ in a name', "ts": 1.5, "args": {"deep": [[1, 2], {"a": None}]}},
    {"ph": "X", "name": "Wörter, 漢字, \u2028", "ts": 12345678901234.125},
    {},
]
HEADER = {"schemaVersion": 1, "deviceProperties": [{"name": "NVIDIA H200"}], "distributedInfo": {}}


def collect(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header: dict[str, Any] = {}
    return header, list(stream.events(path, header))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 22])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, packed: bool) -> None:
    monkeypatch.setattr(stream, "_CHUNK", chunk)
    text = json.dumps(HEADER | {"traceEvents": EVENTS, "traceName": "x", "number": 1234567}, indent=indent, ensure_ascii=False)
    path = tmp_path / "t.json"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    header, events = collect(path)
    assert events == EVENTS
    assert header == HEADER | {"traceName": "x", "number": 1234567}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('[{"ph": "X"}, {"ph": "X"}]', 2),  # Chrome takes a bare list
        ('\n {"traceEvents": [{"dur": NaN}, 3, "text", null]} \n', 1),  # only objects are events
        ('{"traceEvents": [], "traceName": "x"}', 0),
        ('{"traceEvents": [{"name": "control \x01 character"}]}', 1),
    ],
)
def test_odd_but_valid(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert len(collect(path)[1]) == count


def test_progress_reaches_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CHUNK", 64)
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS * 50}).encode()))
    shares: list[float] = []
    list(stream.events(path, {}, shares.append))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


GOOD = json.dumps(HEADER | {"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1.0, "dur": 2.0}] * 3})


@pytest.mark.parametrize("kept", range(1, len(GOOD), 7))
def test_cut_off_anywhere(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.json"
    path.write_text(GOOD[:kept])
    with pytest.raises(TraceError, match=r"^file /.*/cut\.json: expected .*, found .*"):
        collect(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"  \n ", "found an empty file"),
        (b"\x7fELF\x02\x01 not a trace", "found text that begins"),
        (b"# Markdown", "found text that begins"),
        (b'{"model_type": "llama", "hidden_size": 384}', "found JSON with 'model_type', 'hidden_size'"),
        (b"{}", "found text that begins"),
        (b'"text"', "found text that begins"),
        (b"{nonsense}", "found text that begins"),
        (b'{"nonsense', "found text that is not JSON"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-20], "intact gzip file"),
        (gzip.compress(GOOD.encode(), mtime=0)[:30], "intact gzip file"),
        (b"\x1f\x8b\x00\x00 no gzip at all", "intact gzip file"),
        (gzip.compress(b"", mtime=0), "found an empty file"),
        (b'{"traceEvents": [{"ph": "X"}, nonsense]}', "after 1 events"),
        (b"[" * 100_000, "."),
    ],
)
def test_broken_and_foreign(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        collect(path)
    assert "\n" not in str(caught.value)


def test_endless_text_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CHUNK", 1 << 10)
    monkeypatch.setattr(stream, "_LARGEST", 1 << 14)
    path = tmp_path / "t.json"
    path.write_text('{"traceEvents": [{"name": "' + "x" * (1 << 17))
    with pytest.raises(TraceError, match="not JSON"):
        collect(path)


def test_a_missing_file_is_a_bad_argument(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        collect(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot read"):
        collect(tmp_path)


@pytest.mark.parametrize(
    "events", [[], [{"ph": "M", "name": "process_name"}], [{"ph": "X", "cat": "cpu_op", "name": 3, "ts": "?"}]]
)
def test_a_trace_without_an_op_is_none(tmp_path: Path, events: list[Any]) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": events}))
    with pytest.raises(TraceError, match="no event of an op or a kernel"):
        read(path)
