"""The one place that reads live memory; everything else works on the numbers it returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: all there are, and those that can still be allocated."""

    total: int
    free: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host, where torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("alloc" in str(error) or "out of memory" in str(error).lower())


def read_memory(device: torch.device) -> Memory:
    """Total and free bytes of a device.

    A GPU that shares memory with the CPU (an APU) reports too little free memory through its driver, since the page cache
    counts as used there; for it, and for the CPU itself, the operating system is asked instead.
    """
    if device.type == "cpu":
        return _host_memory()
    accelerator = torch.get_device_module(device.type)
    free, total = accelerator.mem_get_info(device)
    if getattr(accelerator.get_device_properties(device), "is_integrated", False):
        free = max(free, min(total, _host_memory().free))
    return Memory(int(total), int(free))


def _host_memory() -> Memory:
    """The machine's memory, or the control group's where that is smaller (containers)."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and limit < total:
        total = limit
        if used is not None:
            reclaimable = _cgroup_stat("inactive_file")
            free = min(free, max(0, limit - used + reclaimable))
    return Memory(total, free)


def _cgroup_bytes(name: str) -> int | None:
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_stat(name: str) -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + " ")), 0)
