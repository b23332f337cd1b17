from __future__ import annotations

import pytest
import torch

from twinweight.kernels.padding import cliff_bytes, empty_padded, padded_stride


@pytest.mark.parametrize(
    ("columns", "itemsize", "cliff", "expected"),
    [
        (4096, 2, 2048, 4160),
        (1024, 2, 2048, 1088),
        (1000, 2, 2048, 1000),
        (512, 4, 2048, 544),
        (2048, 1, 2048, 2176),
        (4096, 2, 0, 4096),
        (0, 2, 2048, 0),
        (4160, 2, 2048, 4160),
    ],
)
def test_stride(columns: int, itemsize: int, cliff: int, expected: int) -> None:
    assert padded_stride(columns, itemsize, cliff_bytes=cliff) == expected


def test_refuses_an_odd_itemsize() -> None:
    with pytest.raises(ValueError, match="itemsize"):
        padded_stride(64, 3, cliff_bytes=2048)


class _Properties:
    def __init__(self, name: str) -> None:
        self.gcnArchName = name


@pytest.mark.parametrize(("name", "expected"), [("gfx1151", 2048), ("gfx1100:xnack-", 2048), ("gfx942", 0), ("gfx1201", 0)])
def test_only_rdna3_has_the_cliff(name: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties(name))
    assert cliff_bytes(torch.device("cuda", 0)) == expected
    assert cliff_bytes(torch.device("cpu")) == 0


def test_empty_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert empty_padded(3, 1024, torch.bfloat16, cpu).stride() == (1024, 1)
    monkeypatch.setattr("twinweight.kernels.padding.cliff_bytes", lambda device: 2048)
    padded = empty_padded(3, 1024, torch.bfloat16, cpu)
    assert (padded.shape, padded.stride()) == ((3, 1024), (1088, 1))
