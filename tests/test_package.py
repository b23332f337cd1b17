"""What holds for the package as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest

import twinweight

ROOT = Path(twinweight.__file__).parent


def test_import_costs_little_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import twinweight; print(time.perf_counter() - t)"
    best = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)
    )
    assert best < 0.2


def test_import_takes_no_heavy_library_along() -> None:
    code = "import sys, twinweight; print(*{'torch', 'transformers', 'triton', 'matplotlib', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_public_names_exist() -> None:
    for name in twinweight.__all__:
        assert getattr(twinweight, name) is not None
    with pytest.raises(AttributeError, match="nosuch"):
        twinweight.nosuch  # noqa: B018


def test_files_stay_small() -> None:
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
