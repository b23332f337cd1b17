"""Measurements outlive the process, and nothing else than what they were measured for uses them."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_measured import measured
from twinweight import cache
from twinweight.cache import Cache, default

CPU = torch.device("cpu")
SHAPE = {"engine": "embedded", "n": 64, "k": 32, "dtype": "bfloat16"}
TIMES = measured(int4=[1, 2, 4], twin_bfloat16=[3, 3, 3])


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "deep" / "cache")


def test_what_was_written_is_read(store: Cache) -> None:
    assert store.read(SHAPE, CPU) is None
    store.write(SHAPE, CPU, TIMES)
    found = store.read(SHAPE, CPU)
    assert found is not None
    assert found.to_json() == TIMES.to_json()
    assert store.read(SHAPE | {"n": 65}, CPU) is None
    assert store.read(SHAPE, CPU, vllm="0.32") is None


@pytest.mark.parametrize("what", ["_versions", "describe"])
def test_other_versions_and_devices_measure_anew(store: Cache, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(SHAPE, CPU, TIMES)
    real = getattr(cache, what)
    monkeypatch.setattr(cache, what, lambda *a: {**real(*a), "torch": "9.9", "name": "another"})
    assert store.read(SHAPE, CPU) is None
    assert len(list(store.records())) == 1


def test_a_mark_holds_for_what_was_done_with_these_versions(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = store.mark(model="a", tp=1)
    assert store.mark(tp=1, model="a") == mark
    assert store.mark(model="a", tp=2) != mark
    store.write(SHAPE, CPU, TIMES)
    mark.touch()
    assert len(list(store.records())) == 1
    real = cache._versions()
    monkeypatch.setattr(cache, "_versions", lambda: {**real, "torch": "9.9"})
    assert store.mark(model="a", tp=1) != mark


def test_threads_count(store: Cache) -> None:
    store.write(SHAPE, CPU, TIMES)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert store.read(SHAPE, CPU) is None
    finally:
        torch.set_num_threads(before)


def damaged(text: str, **changes: object) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "\udcff\udcfe",
        lambda text: damaged(text, format=99),
        lambda text: damaged(text, shape=3),
        lambda text: damaged(text, measured={"ms": [3, 2, 1]}),
        lambda text: damaged(text, shape={"n": 1, "k": 2}),
        lambda text: damaged(text, device={"type": "abacus"}),
    ],
    ids=["empty", "cut", "list", "bare", "bytes", "format", "no object", "times", "another shape", "another device"],
)
def test_files_that_are_corrupt_or_foreign_are_ignored_with_a_message(
    store: Cache, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    store.write(SHAPE, CPU, TIMES)
    (file,) = store.directory.iterdir()
    file.write_bytes(damage(file.read_text()).encode("utf-8", "surrogateescape"))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, logger="twinweight"):
        assert store.read(SHAPE, CPU) is None
    assert file.name in caplog.text
    assert "ignored" in caplog.text
    store.write(SHAPE, CPU, TIMES)
    assert store.read(SHAPE, CPU) is not None


def test_a_directory_that_cannot_be_written_is_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="twinweight"):
        Cache(tmp_path / "file").write(SHAPE, CPU, TIMES)
    assert "not kept" in caplog.text


def test_a_directory_that_cannot_be_searched_is_a_message(
    store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Path, *args: object, **kwargs: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    store.write(SHAPE, CPU, TIMES)
    monkeypatch.setattr(Path, "stat", refused)  # what `exists` and `is_dir` ask
    with caplog.at_level(logging.WARNING):
        assert store.read(SHAPE, CPU) is None
        assert list(store.records()) == []
    assert caplog.text.count("cannot be read: Permission denied") == 2


def test_nothing_half_written_stays(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(SHAPE, CPU, TIMES)
    before = {f.name: f.read_text() for f in store.directory.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    store.write(SHAPE, CPU, replace(TIMES, n=7))
    assert {f.name: f.read_text() for f in store.directory.iterdir()} == before


def test_records_say_what_they_hold(store: Cache) -> None:
    assert list(store.records()) == []
    store.write(SHAPE, CPU, TIMES)
    (store.directory / "else.json").write_text("{}")
    (record,) = store.records()
    assert record.shape == SHAPE
    assert record.device["type"] == "cpu"
    assert {"torch", "kernels", "twinweight"} <= set(record.versions)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TWINWEIGHT_CACHE": "off"}, None),
        ({"TWINWEIGHT_CACHE": "OFF", "XDG_CACHE_HOME": "/x"}, None),
        ({"TWINWEIGHT_CACHE": "/somewhere"}, Path("/somewhere")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/twinweight")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache" / "twinweight"),
        ({}, Path.home() / ".cache" / "twinweight"),
    ],
)
def test_where_it_is(environ: dict[str, str], expected: Path | None) -> None:
    found = default(environ)
    assert (found.directory if found else None) == expected
