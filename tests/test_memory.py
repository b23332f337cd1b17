from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from twinweight import memory

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=600))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_host_memory_without_a_control_group(machine: Path) -> None:
    assert memory.read_memory(CPU) == memory.Memory(1000, 600)


def test_a_smaller_control_group_is_the_limit(machine: Path) -> None:
    (machine / "memory.max").write_text("500\n")
    (machine / "memory.current").write_text("300\n")
    (machine / "memory.stat").write_text("anon 100\ninactive_file 50\n")
    assert memory.read_memory(CPU) == memory.Memory(500, 250)


@pytest.mark.parametrize("limit", ["max", "5000"])
def test_an_unlimited_control_group_changes_nothing(machine: Path, limit: str) -> None:
    (machine / "memory.max").write_text(limit)
    assert memory.read_memory(CPU) == memory.Memory(1000, 600)


@pytest.mark.parametrize(("integrated", "free"), [(True, 600), (False, 100)])
def test_gpus_that_share_memory_ask_the_system(
    machine: Path, monkeypatch: pytest.MonkeyPatch, integrated: bool, free: int
) -> None:
    gpu = SimpleNamespace(
        mem_get_info=lambda device: (100, 800), get_device_properties=lambda device: SimpleNamespace(is_integrated=integrated)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda name: gpu)
    assert memory.read_memory(torch.device("cuda", 0)) == memory.Memory(800, free)
