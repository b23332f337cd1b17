"""Our kernels and the Triton of this environment, which is not the one that they were written for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

ROOT = Path(__file__).parents[3]


def test_kernels_of_an_h200_compile(tmp_path: Path) -> None:
    """In other processes too, which this one then does without."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "tests/kernels/compile_ahead.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"] == found["jobs"] >= 3
    assert found["rewritten"] == found["again"] == found["failed"] == 0
