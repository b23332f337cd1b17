"""The parts of a worker's life that need no server: making room for the KV floor, waking, budgets."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

import torch

from twinweight.engines.vllm import compat
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.life import Life
from twinweight.errors import BudgetError
from twinweight.plan import Budget, Mode, Plan, TwinOption

MIB = 1 << 20


class FakeKernel:
    def __init__(self) -> None:
        self.twin: object = object()
        self.fresh = True

    def drop(self) -> None:
        self.twin = None


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "gather", lambda value: [value])
    monkeypatch.setattr(compat, "rank", lambda: 1)  # rank 0 writes the log line, which needs real kernels


def life(mode: Mode = "soft", fixed: int | None = None) -> Life:
    """Three twins of 1, 2 and 4 MiB, the first the most valuable, and a KV floor of 10 MiB."""
    worker = SimpleNamespace(
        device="cpu",
        model_runner=SimpleNamespace(model_memory_usage=100 * MIB),
        available_kv_cache_memory_bytes=0,
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed)),
    )
    found = Life(worker, Config(mode))
    kernels: Any = {name: FakeKernel() for name in "abc"}
    found.kernels, found.built = kernels, ["a", "b", "c"]
    twins = {name: TwinOption("bfloat16", nbytes * MIB, 1.0) for name, nbytes in zip("abc", (1, 2, 4), strict=True)}
    found.plan = Plan(mode, Budget(1 << 30, 1 << 30), twins, {})
    found.floor = compat.KVFloor(tokens=10, nbytes=10 * MIB, per_token=MIB)
    return found


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("available", "expected", "kept"),
    [(10, 10, "abc"), (20, 20, "abc"), (9, 13, "ab"), (5, 11, "a"), (4, 10, "a"), (1, 8, "")],
)
def test_twins_make_room_for_the_kv_floor_least_valuable_first(available: int, expected: int, kept: str) -> None:
    found = life()
    assert found._size(lambda: available * MIB) == expected * MIB
    assert found.built == list(kept)
    assert [name for name, k in found.kernels.items() if k.twin is not None] == list(kept)
    freed = sum({"a": 1, "b": 2, "c": 4}[n] for n in "abc" if n not in kept)
    assert found.worker.model_runner.model_memory_usage == (100 - freed) * MIB


@pytest.mark.usefixtures("alone")
def test_hard_says_how_much_is_short() -> None:
    with pytest.raises(BudgetError, match="KV floor is"):
        life("hard")._size(lambda: 9 * MIB)


@pytest.mark.usefixtures("alone")
def test_a_fixed_kv_cache_is_left_alone() -> None:
    found = life(fixed=4 * MIB)
    assert found._size(lambda: 4 * MIB) == 4 * MIB
    assert found.built == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("tags", "alone", "mapped", "refilled"),
    [
        (None, False, 0, True),
        (["weights"], False, 1, True),
        (["weights"], True, 0, True),
        (["kv_cache"], False, 0, False),
    ],
)
def test_twins_are_refilled_once_weights_are_awake(
    monkeypatch: pytest.MonkeyPatch, tags: list[str] | None, alone: bool, mapped: int, refilled: bool
) -> None:
    found = life()
    done: list[str] = []
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(compat, "wakes_alone", lambda: alone)
    monkeypatch.setattr(compat, "wake_pool", lambda worker: done.append("mapped"))
    monkeypatch.setattr(found, "_refill", lambda: done.append("refilled"))
    found._sleep(lambda level: None, 1)
    found._reload(lambda: None)
    assert done == []  # nothing touches unmapped memory
    found._wake(lambda tags: None, tags)
    assert done == ["mapped"] * mapped + ["refilled"] * refilled
    assert found.asleep is not refilled


def test_an_unknown_version_warns_and_stays_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import vllm

    compat.supported.cache_clear()
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setattr(compat.log, "propagate", True)
    monkeypatch.setattr(__import__("logging").getLogger("vllm"), "propagate", True)
    assert not compat.supported()
    assert "stays off in 0.99.1" in caplog.text
    compat.supported.cache_clear()
