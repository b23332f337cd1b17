"""The parts of a worker's life that need no server: making room for the KV floor, waking, budgets."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

import torch

from twinweight.engines.vllm import build, compat, own, spare, telling
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.life import Built, Life
from twinweight.errors import BudgetError
from twinweight.paths import Path, Route
from twinweight.plan import Budget, Mode, Plan, TwinOption

MIB = 1 << 20


class FakeKernel:
    def __init__(self) -> None:
        self.twin: object = object()
        self.own: object = None
        self.fresh = True
        self.device = torch.device("cpu")
        self.route: list[int] = []
        self.freed = 0

    def drop(self) -> None:
        self.twin = self.own = None


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "gather", lambda value: [value])
    monkeypatch.setattr(compat, "rank", lambda: 1)  # rank 0 writes the log line, which needs real kernels


def life(mode: Mode = "soft", fixed: int | None = None) -> Life:
    """Three twins of 1, 2 and 4 MiB, the first the most valuable, and a KV floor of 10 MiB."""
    worker = SimpleNamespace(
        device="cpu",
        model_runner=SimpleNamespace(model_memory_usage=100 * MIB, get_model=torch.nn.Module),
        available_kv_cache_memory_bytes=0,
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed), instance_id="test"),
    )
    found = Life(worker, Config(mode))
    kernels: Any = {name: FakeKernel() for name in "abc"}
    found.kernels = kernels
    twins = {name: TwinOption("bfloat16", nbytes * MIB, 1.0) for name, nbytes in zip("abc", (1, 2, 4), strict=True)}
    found.built = {name: Built("bfloat16", twin.nbytes) for name, twin in twins.items()}
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
    assert list(found.built) == list(kept)
    assert [name for name, k in found.kernels.items() if k.twin is not None] == list(kept)
    freed = sum({"a": 1, "b": 2, "c": 4}[n] for n in "abc" if n not in kept)
    assert found.worker.model_runner.model_memory_usage == (100 - freed) * MIB


@pytest.mark.usefixtures("alone")
def test_hard_says_how_much_is_short() -> None:
    with pytest.raises(BudgetError, match="KV floor is"):
        life("hard")._size(lambda: 9 * MIB)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("free", "kept"), [(4, "abc"), (3, "ab"), (1, "ab"), (0, "ab"), (-1, "a"), (-9, "")])
def test_twins_leave_room_for_a_fixed_kv_cache_on_a_cpu_before_vllm_looks(
    monkeypatch: pytest.MonkeyPatch, free: int, kept: str
) -> None:
    found = life(fixed=4 * MIB)
    held = {"a": 1, "b": 2, "c": 4}
    monkeypatch.setattr(compat, "free_memory", lambda worker: free * MIB)
    assert found._size(lambda: 4 * MIB) == 4 * MIB  # what the user said is what vLLM gets
    assert list(found.built) == list(kept)
    assert free + sum(held[n] for n in "abc" if n not in kept) >= 4 or not kept


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("free", "kept"), [(9, "abc"), (8, "ab"), (5, "ab"), (4, "a"), (-9, "")])
def test_twins_leave_room_for_a_fixed_kv_cache_and_activations_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, kept: str
) -> None:
    found = life(fixed=4 * MIB)
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    monkeypatch.setattr(compat, "free_memory", lambda worker: free * MIB)
    monkeypatch.setattr(compat, "forward_peak", lambda worker: nullcontext(lambda: 3 * MIB))
    monkeypatch.setattr(compat, "trim_pool", lambda worker: None)
    monkeypatch.setattr(compat, "graphs_bytes", lambda worker: 2 * MIB)
    assert found._size(lambda: 4 * MIB) == 4 * MIB
    assert list(found.built) == list(kept)


@pytest.mark.usefixtures("alone")
def test_what_took_the_place_of_vllm_s_weight_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is left for its layer."""
    found = life()
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    found.kernels["c"].freed = 4 * MIB
    assert found._make_room(1) == 2 * MIB
    assert list(found.built) == ["a", "c"]
    assert found.status()["bytes"] == MIB  # of 5, which 4 of vLLM's paid for
    assert found._make_room(4 * MIB) == MIB
    assert found._make_room(1) == 0
    assert list(found.built) == ["c"]


@pytest.mark.parametrize(("reload", "allocator", "gone"), [(False, None, "a"), (True, None, ""), (False, object(), "")])
def test_vllm_s_weights_go_where_weights_stay_what_they_are(
    reload: bool, allocator: object, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = life()
    found.config = replace(found.config, reload=reload)
    routes = {"a": [0, Path.INT4, 64, Path.FUSED], "b": [0, Path.INT4, 64, Path.INNER], "c": [0, Path.INT4, 64, Path.TWIN]}
    for name, kernel in found.kernels.items():
        kernel.own, kernel.route = object(), routes[name]  # type: ignore[assignment]
        kernel.twin = kernel.twin if name == "c" else None
    charged: list[int] = []
    held = iter((100, 60))
    monkeypatch.setattr(compat, "sleeper", lambda worker: allocator)
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: next(held))
    monkeypatch.setattr(compat, "charge", lambda worker, nbytes: charged.append(nbytes))
    monkeypatch.setattr(spare, "free", lambda kernel: setattr(kernel, "freed", 20))
    found._free_spare()
    assert "".join(name for name in "abc" if found.kernels[name].freed) == gone
    assert charged == ([-40] if gone else [])
    if gone:
        for replaced in (found.refresh, lambda: found._reload(pytest.fail), lambda: found._replace(pytest.fail)):
            with pytest.raises(RuntimeError, match="weights cannot be replaced"):
                replaced()


def test_a_freed_weight_keeps_its_shape_and_the_bias_its_values() -> None:
    from twinweight.engines.vllm.kernel import TwinLinearKernel

    layer = torch.nn.Module()
    layer.weight_packed = torch.nn.Parameter(torch.ones(64, 8, dtype=torch.int32), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(torch.ones(64, 2), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.ones(64), requires_grad=False)
    whole = torch.ones(128)
    layer.register_buffer("part", whole[:64])
    kernel: Any = TwinLinearKernel.__new__(TwinLinearKernel)
    kernel._layer, kernel.freed = weakref.ref(layer), 0
    assert spare.free(kernel) == kernel.freed == 64 * 8 * 4 + 64 * 2 * 4
    assert layer.weight_packed.shape == (64, 8)
    assert layer.weight_packed.untyped_storage().nbytes() == 0
    assert layer.bias.sum() == layer.part.sum() == 64
    with pytest.raises(RuntimeError, match="was freed"):
        kernel.inner_linear(torch.ones(1, 16), None)


def test_own_copies_are_not_counted_as_twins() -> None:
    found = life()
    found.kernels["a"].own = found.kernels["b"].own = object()  # type: ignore[assignment]
    found.kernels["b"].twin = None
    assert {key: found.status()[key] for key in ("twins", "copies", "missed")} == {"twins": 2, "copies": 2, "missed": 0}
    assert telling.built(found) == "2 twins and 2 int4 copies"
    found._drop(["b", "c"])
    assert (found.status()["twins"], found.status()["copies"]) == (1, 1)
    del found.built["a"]
    assert telling.built(found) == "0 twins"


class Kinds:
    """A life whose layers a and b are wide and c is tall, all planned with copies, b and c with nothing else; a plan without
    the copies of a kind gives it twins. What the other rank finds is `elsewhere`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, elsewhere: dict[str, str]) -> None:
        from twinweight.engines.vllm import life as module

        self.life, self.kinds, self.freed = life(), {"a": "wide", "b": "wide", "c": "tall"}, 0
        for name, kernel in self.life.kernels.items():
            kernel.kind = self.kinds[name]  # type: ignore[attr-defined]
        self.elsewhere = elsewhere
        monkeypatch.setattr(module, "kind_of", lambda kernel: kernel.kind)
        monkeypatch.setattr(compat, "gather", self.gather)
        monkeypatch.setattr(compat, "chunk", lambda worker: 2048)
        monkeypatch.setattr(compat, "memory_in_use", self.memory)
        monkeypatch.setattr(compat, "trim_pool", lambda worker: None)
        monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
        monkeypatch.setattr(compat, "pool", lambda worker: nullcontext())
        monkeypatch.setattr(build, "allocate", lambda kernel, kind: setattr(kernel, "twin", kind))
        monkeypatch.setattr(build, "fill", lambda kernel: None)
        monkeypatch.setattr(own, "allocate", lambda kernel: setattr(kernel, "own", object()))
        monkeypatch.setattr(own, "fill", lambda kernel: True)
        monkeypatch.setattr(own, "held_bytes", lambda kernel: 7 if kernel.own is None else 9)
        monkeypatch.setattr(own, "compile_paths", lambda kernels, most: None)
        monkeypatch.setattr(own, "agrees", lambda kernel: True)
        monkeypatch.setattr(self.life, "_offers", dict)
        monkeypatch.setattr(self.life, "_plan", self.plan)
        monkeypatch.setattr(self.life, "_route", self.route)
        self.life.plan = self.plan()

    def gather(self, value: Any) -> list[Any]:
        reasons = isinstance(value, dict) and value.keys() <= {"wide", "tall"} and not self.life.no_copies
        return [value, self.elsewhere if reasons else value]

    def memory(self, worker: Any) -> int:
        self.freed += all(kernel.own is None and kernel.twin is None for kernel in self.life.kernels.values())
        return 0

    def plan(self) -> Plan:
        forms = {"a": "own+bfloat16", "b": "own", "c": "own"}
        forms |= {name: "bfloat16" for name, kind in self.kinds.items() if kind in self.life.no_copies}
        options = {name: TwinOption(form, 9, 1.0, not form.startswith("own")) for name, form in forms.items()}
        return Plan("soft", Budget(1 << 30, 1 << 30), options, {})

    def route(self, kernel: Any, form: str) -> Route:
        return Route((0, 128), (Path.INT4, Path.TWIN)) if form == "bfloat16" else Route((0, 64), (Path.INT4, Path.FUSED))


@pytest.mark.parametrize("where", ["made", "tried", "made elsewhere"])
def test_without_the_copies_that_cannot_be_had_there_is_another_plan(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a copy would have done may be worth a twin. All ranks plan anew."""
    why = {"tried": "our kernels compute something else"}.get(where, "the weight cannot be read back exactly")
    server = Kinds(monkeypatch, {"wide": why} if where == "made elsewhere" else {})
    found = server.life
    if where == "made":
        monkeypatch.setattr(own, "fill", lambda kernel: kernel.kind != "wide")  # type: ignore[attr-defined]
    if where == "tried":
        monkeypatch.setattr(own, "agrees", lambda kernel: kernel.kind != "wide")  # type: ignore[attr-defined]
    found._build()
    assert found.built == {"a": Built("bfloat16", 7), "b": Built("bfloat16", 7), "c": Built("own", 9)}
    assert {name: k.own is not None for name, k in found.kernels.items()} == {"a": False, "b": False, "c": True}
    assert [found.kernels[n].route for n in "abc"] == [[0, Path.INT4, 128, Path.TWIN]] * 2 + [[0, Path.INT4, 64, Path.FUSED]]
    assert f"no own int4 copies for wide: {why}" in caplog.text
    assert server.freed == 1  # before the second plan


def test_what_fails_on_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would wait for it in the next exchange until that times out."""
    found, told = life(), []
    monkeypatch.setattr(compat, "rank", lambda: 1)
    monkeypatch.setattr(compat, "gather", lambda value: told.append(value) or [value, "ValueError: too little memory"])
    with pytest.raises(RuntimeError, match="rank 1 failed: ValueError: too little memory"):
        found._size(lambda: 9 * MIB)
    assert told == [None]

    def short() -> int:
        raise ValueError("Available memory on node 1 is less than requested")

    for method in (found._size, found._load):
        with pytest.raises(ValueError, match="on node 1"):
            method(short)
    assert told == [None, *["ValueError: Available memory on node 1 is less than requested"] * 2]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_timing_that_fails_in_any_way_leaves_int4(
    mode: Mode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from twinweight.engines.vllm import life as module

    def broken(*args: object) -> None:
        raise StopIteration

    found = life(mode)
    monkeypatch.setattr(compat, "rank", lambda: 0)
    monkeypatch.setattr(compat, "chunk", lambda worker: 2048)
    monkeypatch.setattr(module, "kind_of", lambda kernel: "kind")
    monkeypatch.setattr(module.measure, "known_or_measured", broken)
    with nullcontext() if mode == "soft" else pytest.raises(BudgetError, match="could not be timed"):
        assert found._measure() == {}
    assert "could not time the kernels" in caplog.text


@pytest.mark.usefixtures("alone")
def test_only_what_is_really_there_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An 8-bit twin of a weight that cannot be read back is not."""
    found = life()
    forms = {"a": "bfloat16", "b": "fp8-exact"}
    found.plan = Plan("soft", Budget(1 << 30, 1 << 30), {n: TwinOption(form, 9 * MIB, 1.0) for n, form in forms.items()}, {})

    def fill(kernel: Any) -> None:
        if kernel is found.kernels["b"]:
            raise build.Unreadable("the int4 weight behind Inner cannot be read back")

    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    monkeypatch.setattr(own, "held_bytes", lambda kernel: 4 * MIB)
    monkeypatch.setattr(build, "allocate", lambda kernel, kind: None)
    monkeypatch.setattr(build, "fill", fill)
    monkeypatch.setattr(found, "_route", lambda kernel, form: Route.always(Path.TWIN))
    found._build()
    assert found.built == {"a": Built("bfloat16", 4 * MIB)}
    assert {key: found.status()[key] for key in ("twins", "missed", "bytes")} == {"twins": 1, "missed": 1, "bytes": 4 * MIB}
    assert found.kernels["b"].twin is None
    assert "no fp8-exact twin: the int4 weight behind Inner cannot be read back" in caplog.text
    assert found._make_room(1) == 4 * MIB


def test_ranks_keep_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    found = life()
    mine, theirs = {"a": "own+bfloat16", "b": "own", "c": "bfloat16"}, {"a": "own+bfloat16", "c": "bfloat16"}
    sizes = {"a": 5, "c": 6}
    monkeypatch.setattr(compat, "gather", lambda value: [value, theirs if "b" in value else sizes])
    monkeypatch.setattr(own, "held_bytes", lambda kernel: 7)
    found.kernels["b"].own = object()  # type: ignore[assignment]
    found._keep_common(mine)
    assert found.built == {"a": Built("own+bfloat16", 5), "c": Built("bfloat16", 6)}
    assert (found.kernels["b"].twin, found.kernels["b"].own) == (None, None)


def test_weights_stay_gone_while_a_worker_sleeps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = life(), []
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(compat, "wakes_alone", lambda: True)
    monkeypatch.setattr(found, "_refill", lambda: seen.append("refilled"))
    for level in (2, 1):
        found._sleep(lambda level: None, level)
    found._wake(lambda tags: None)
    assert seen == []
    found.refresh()  # after weights came by a way that vLLM does not know of
    found._sleep(lambda level: None, 1)
    found._wake(lambda tags: None)
    assert seen == ["refilled"] * 2


@pytest.mark.parametrize("level", [1, 2])
def test_weights_that_sleep_threw_away_are_read_once_they_are_reloaded(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = life(), []
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(compat, "wakes_alone", lambda: True)
    monkeypatch.setattr(found, "_refill", lambda: seen.append("refilled"))
    found._sleep(lambda level: None, level=level)
    found._wake(lambda tags: None, ["weights"])
    assert seen == ["refilled"] * (level == 1)
    assert not found.asleep
    found._reload(lambda: None)
    assert seen == ["refilled"] * (3 - level)
    found._sleep(lambda level: None, 1)
    found._wake(lambda tags: None, None)
    assert len(seen) == 4 - level


def test_a_refill_that_fails_leaves_a_worker_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next wake tries again: what was mapped anew and not written must not serve."""
    found, seen = life(), []
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(compat, "wakes_alone", lambda: True)

    def refill() -> None:
        seen.append("tried")
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(found, "_refill", refill)
    found._sleep(lambda level: None, 1)
    with pytest.raises(torch.OutOfMemoryError):
        found._wake(lambda tags: None)
    found._wake(lambda tags: None)
    assert seen == ["tried", "tried"]
    assert not found.asleep


@pytest.mark.parametrize(("tags", "gone"), [(("kv_cache",), False), (("weights",), True), (("weights", "kv_cache"), True)])
def test_twins_are_discarded_with_the_weights_and_come_back_with_them(
    monkeypatch: pytest.MonkeyPatch, tags: tuple[str, ...], gone: bool
) -> None:
    found = life()
    seen: list[Any] = []
    monkeypatch.setattr(compat, "wakes_alone", lambda: True)
    monkeypatch.setattr(found, "_refill", lambda: seen.append("refilled"))
    found._discard(seen.append, tags)
    assert seen == [(*tags, compat.POOL) if gone else tags]
    found._reload(lambda: None)
    found._wake(lambda tags: None, None)
    assert seen[1:] == ["refilled"]  # by the reload where the twins stayed, on waking where they went


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


class Allocator:
    """As vLLM 0.26's: one pool a tag, which dies when the next one takes its place."""

    def __init__(self) -> None:
        self.allocator_and_pools: dict[str, Any] = {}
        self.entered = 0
        self.inside = False

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        self.entered += 1
        self.inside = True
        self.allocator_and_pools[tag] = (FakePool(self), None)
        yield
        self.inside = False


class FakePool:
    died: ClassVar[list[bool]] = []

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator

    def __del__(self) -> None:
        self.died.append(self.allocator.inside)


def test_no_pool_of_twins_dies_while_another_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.device_allocator

    allocator = Allocator()
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(enable_cumem_allocator=True)),
        _maybe_get_memory_pool_context=lambda tag: allocator.use_memory_pool(tag),
    )
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(vllm.device_allocator, "get_mem_allocator_instance", lambda: allocator, raising=False)
    for _ in range(4):
        with compat.pool(worker):
            assert FakePool.died == []
    assert len(allocator.allocator_and_pools) == 4


@pytest.mark.parametrize("several", [False, True], ids=["0.26", "0.32"])
def test_memory_of_dropped_twins_goes_back_to_the_device(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.device_allocator
    import vllm.device_allocator.cumem as cumem

    segments = [{"address": 1, "allocated_size": 0}, {"address": 2, "allocated_size": 5}, {"address": 3, "allocated_size": 0}]
    one = (SimpleNamespace(snapshot=lambda: segments), "its allocator")
    handles = {1: "first", 2: "second"}  # 3 is trimmed already
    allocator = SimpleNamespace(
        allocator_and_pools={compat.POOL: [one] if several else one, "weights": "others"}, pointer_to_data=handles,
        _python_free_callback=handles.pop,
    )  # fmt: skip
    worker = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(enable_cumem_allocator=True)))
    unmapped: list[str] = []
    monkeypatch.setattr(vllm.device_allocator, "get_mem_allocator_instance", lambda: allocator, raising=False)
    monkeypatch.setattr(cumem, "unmap_and_release", unmapped.append)
    compat.trim_pool(worker)
    assert unmapped == ["first"]
    assert handles == {2: "second"}
    worker.vllm_config.model_config.enable_cumem_allocator = False
    compat.trim_pool(worker)


@pytest.mark.usefixtures("alone")
def test_all_twins_share_one_pool_and_those_after_the_last_that_fits_stay_int4(monkeypatch: pytest.MonkeyPatch) -> None:
    found, entered = life(), []

    @contextmanager
    def pool(worker: object) -> Iterator[None]:
        entered.append(worker)
        yield

    def allocate(kernel: Any, kind: str) -> None:
        if kernel is found.kernels["a"]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compat, "pool", pool)
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    monkeypatch.setattr(build, "allocate", allocate)
    monkeypatch.setattr(build, "fill", lambda kernel: None)
    monkeypatch.setattr(own, "held_bytes", lambda kernel: 5)
    monkeypatch.setattr(found, "_route", lambda kernel, form: Route.always(Path.TWIN))
    options = {name: TwinOption("bfloat16", MIB, saved) for name, saved in (("a", 1.0), ("b", 3.0), ("c", 2.0))}
    found.plan = Plan("soft", Budget(1 << 30, 1 << 30), options, {})
    found._build()
    assert found.built == {name: Built("bfloat16", 5) for name in "bc"}
    assert len(entered) == 1
    assert found.kernels["a"].twin is None


@pytest.mark.parametrize("mode", ["off", "soft"])
def test_an_unknown_version_stays_off_and_warns_who_asked_for_twins(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    import vllm

    from twinweight.engines.vllm import _start

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    compat.warn_unknown.cache_clear()
    monkeypatch.setattr(Life, "follow", lambda self: pytest.fail("twins in an unknown version"))
    for _ in range(2):
        _start(SimpleNamespace(), SimpleNamespace(additional_config={"twinweight": {"mode": mode}}))
    warned = [r for r in caplog.records if "stays off in 0.99.1" in r.message]
    assert len(warned) == (mode == "soft")


@pytest.mark.parametrize("mode", ["off", "soft"])
def test_an_unknown_version_without_the_worker_we_know_warns_too(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    import vllm

    from twinweight.engines.vllm import register

    def missing(action: object) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(compat, "on_init_device", missing)
    monkeypatch.setenv("TWINWEIGHT_MODE", mode)
    compat.warn_unknown.cache_clear()
    register()
    assert ("stays off in 0.99.1" in caplog.text) is (mode == "soft")
