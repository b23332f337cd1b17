"""Our kernels and the Triton of this environment, which is not the one that they were written for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

from tests.helpers import compiled_ahead


def test_kernels_of_an_h200_compile(tmp_path: Path) -> None:
    """In other processes too, which this one then does without."""
    found = compiled_ahead(tmp_path)
    assert found["compiled"] == found["jobs"] >= 3
    assert found["rewritten"] == found["again"] == found["failed"] == 0
