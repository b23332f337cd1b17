"""Variables that the embedded engine ignores are told, once."""

from __future__ import annotations

from pathlib import Path

import pytest

import twinweight
from twinweight.engines import variables
from twinweight.errors import CheckpointError


def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: Path, **environ: str) -> list[str]:
    """The warnings of two loads, which end where a checkpoint is missing."""
    variables._warn.cache_clear()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            twinweight.load(where / "none", device="cpu")
    return [r.getMessage() for r in caplog.records if r.name == "twinweight"]


def test_a_misspelt_variable_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (said,) = told(caplog, monkeypatch, tmp_path, TWINWEIGHT_MOOD="off")
    assert said.startswith(
        "unknown variable TWINWEIGHT_MOOD is ignored; "
        "known: TWINWEIGHT_CACHE, TWINWEIGHT_DTYPE, TWINWEIGHT_HEAD, TWINWEIGHT_MODE; "
    )
    assert "TWINWEIGHT_KV_FLOOR" in said


def test_a_variable_of_the_plugin_is_said_to_be_its(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (said,) = told(caplog, monkeypatch, tmp_path, TWINWEIGHT_KV_FLOOR="4096", TWINWEIGHT_RELOAD="")
    assert said == "TWINWEIGHT_KV_FLOOR: only the vLLM plugin reads this, here it is ignored"


def test_those_that_are_read_are_not_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert told(caplog, monkeypatch, tmp_path, TWINWEIGHT_MODE="soft", TWINWEIGHT_DTYPE="dense") == []
