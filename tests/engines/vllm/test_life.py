"""The parts of a worker's life that need no server: making room for the KV floor, waking, budgets."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM (make test-vllm)", allow_module_level=True)

import torch

from tests.engines.vllm.jobs import times_logged
from twinweight.engines.vllm import build, compat, offers, own, ranks, spare, telling
from twinweight.engines.vllm.config import Config
from twinweight.engines.vllm.kinds import Kind
from twinweight.engines.vllm.life import Built, Life
from twinweight.errors import BudgetError
from twinweight.paths import Path, Route
from twinweight.plan import Budget, Mode, Plan, TwinOption

MIB = 1 << 20
KIND = Kind(8, 8, 8, "uint4b8", False, False, torch.bfloat16, "Inner")


class FakeKernel:
    def __init__(self) -> None:
        self.twin: object = object()
        self.own: object = None
        self.fresh = True
        self.device = torch.device("cpu")
        self.route: list[int] = []
        self.freed = 0
        self.copyable = True

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


def test_what_vllm_s_kernel_reads_is_freed_and_nothing_else() -> None:
    from twinweight.engines.vllm.kernel import TwinLinearKernel

    layer = torch.nn.Module()
    for name, dtype in {
        "packed": torch.int32,
        "renamed": torch.bfloat16,
        "bias": torch.float32,
        "other": torch.float32,
    }.items():
        layer.register_parameter(name, torch.nn.Parameter(torch.ones(64, dtype=dtype), requires_grad=False))
    kernel: Any = TwinLinearKernel.__new__(TwinLinearKernel)
    kernel._layer, kernel.freed, kernel.made = weakref.ref(layer), 0, {"renamed"}
    kernel.inner = SimpleNamespace(w_q_name="packed", w_s_name="scale", w_zp_name=None)
    assert spare.free_one(kernel) == kernel.freed == 64 * 4 + 64 * 2
    assert (layer.packed.shape, layer.packed.dtype) == ((0,), torch.int32)
    assert layer.bias.sum() == layer.other.sum() == 64
    assert kernel.device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="was freed"):
        kernel.inner_linear(torch.ones(1, 16), None)


def test_own_copies_are_not_counted_as_twins() -> None:
    found = life()
    found.kernels["a"].own = found.kernels["b"].own = object()  # type: ignore[assignment]
    found.kernels["b"].twin = None
    assert {key: found.status()[key] for key in ("twins", "copies", "missed")} == {"twins": 2, "copies": 2, "missed": 0}
    assert telling.built(found) == "2 twins and 2 int4 copies"
    del found.built["b"], found.built["c"]
    assert (found.status()["twins"], found.status()["copies"]) == (1, 1)
    del found.built["a"]
    assert telling.built(found) == "0 twins"


class Group:
    """Ranks in threads, each with a life, whose exchanges meet: one that makes another exchange than the rest times out."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.values: list[object] = [None] * ranks
        self.rank = threading.local()

    def gather(self, value: object) -> list[object]:
        self.values[self.rank.value] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def run(self, lives: list[Life], action: Callable[[Life], object] = Life._build) -> None:
        def one(rank: int) -> None:
            self.rank.value = rank
            action(lives[rank])

        with ThreadPoolExecutor(len(lives)) as pool:
            list(pool.map(one, range(len(lives))))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[Group, list[Life]]:
    """Two ranks. Layers a and b are wide, c is tall; all are planned with copies, b and c with nothing else. A layer that has
    none gets a twin from the next plan.
    """
    from twinweight.engines.vllm import life as module

    group, lives = Group(2), [life(), life()]
    for rank, found in enumerate(lives):
        for (name, kernel), kind in zip(found.kernels.items(), ("wide", "wide", "tall"), strict=True):
            kernel.kind, kernel.place = kind, (rank, name)  # type: ignore[attr-defined]
        monkeypatch.setattr(found, "_offers", dict)
        monkeypatch.setattr(found, "_plan", functools.partial(planned, found))
        monkeypatch.setattr(found, "_route", routed)
        found.built = {}
        found.plan = planned(found)
    for of in (module, telling):
        monkeypatch.setattr(of, "kind_of", lambda kernel: kernel.kind)
    monkeypatch.setattr(compat, "gather", group.gather)
    monkeypatch.setattr(compat, "chunk", lambda worker: 2048)
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    monkeypatch.setattr(compat, "trim_pool", lambda worker: None)
    monkeypatch.setattr(compat, "device_of", lambda worker: torch.device("cuda"))
    monkeypatch.setattr(compat, "pool", lambda worker: nullcontext())
    monkeypatch.setattr(own, "allocate", lambda kernel: setattr(kernel, "own", object()))
    monkeypatch.setattr(build, "allocate", allocated)
    monkeypatch.setattr(build, "fill", lambda kernel: None)
    monkeypatch.setattr(own, "fill", lambda kernel: True)
    monkeypatch.setattr(own, "held_bytes", lambda kernel: 7 if kernel.own is None else 9)
    monkeypatch.setattr(own, "compile_paths", lambda kernels, most: None)
    monkeypatch.setattr(own, "agrees", lambda kernel: True)
    return group, lives


def allocated(kernel: Any, form: str) -> bool:
    kernel.twin = offers.twin_of(form)
    if offers.has_copy(form):
        own.allocate(kernel)
    return True


def planned(found: Life) -> Plan:
    forms = {"a": "own+bfloat16", "b": "own", "c": "own"}
    forms |= {name: "bfloat16" for name, kernel in found.kernels.items() if not kernel.copyable}
    options = {name: TwinOption(form, 9, 1.0, not form.startswith("own")) for name, form in forms.items()}
    return Plan("soft", Budget(1 << 30, 1 << 30), {n: o for n, o in options.items() if n not in found.built}, {})


def routed(kernel: object, form: str) -> Route:
    return Route((0, 128), (Path.INT4, Path.TWIN)) if form == "bfloat16" else Route((0, 64), (Path.INT4, Path.FUSED))


@pytest.mark.parametrize(
    ("function", "where", "gone", "why"),
    [
        ("fill", {(0, "b")}, "b", "1 of wide (the weight cannot be read back exactly)"),
        ("fill", {(1, "a"), (1, "b")}, "ab", "2 of wide (the weight cannot be read back exactly)"),
        ("fill", {(0, "a"), (1, "c")}, "ac", "1 of tall (the weight cannot be read back exactly)"),
        ("agrees", {(1, "c")}, "c", "1 of tall (our kernels compute something else)"),
        ("agrees", {(0, "a"), (0, "b")}, "ab", "2 of wide (our kernels compute something else)"),
    ],
)
def test_without_the_copies_that_cannot_be_had_all_ranks_plan_anew(
    two: tuple[Group, list[Life]], function: str, where: set[tuple[int, str]], gone: str, why: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What a copy would have done may be worth a twin. Other layers keep theirs."""
    group, lives = two
    monkeypatch.setattr(own, function, lambda kernel: kernel.place not in where)
    group.run(lives)
    for found in lives:
        forms = {"a": "own+bfloat16", "b": "own", "c": "own"} | dict.fromkeys(gone, "bfloat16")
        expected = {name: Built(form, 7 if form == "bfloat16" else 9) for name, form in forms.items()}
        assert found.built == expected
        assert {name: k.own is not None for name, k in found.kernels.items()} == {name: name not in gone for name in "abc"}
        assert all(found.kernels[name].route == [0, Path.INT4, 128, Path.TWIN] for name in gone)
    assert caplog.text.count(why) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_ends_on_one_rank_ends_what_all_have(
    two: tuple[Group, list[Life]], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, lives = two

    def fill(kernel: Any) -> bool:
        if kernel.place == (rank, "b"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    monkeypatch.setattr(own, "fill", fill)
    group.run(lives)
    assert [list(found.built) for found in lives] == [["a"], ["a"]]
    assert all(found.kernels[name].own is None for found in lives for name in "bc")


def test_what_fails_on_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would wait for it in the next exchange until that times out."""
    found, told = life(), []
    theirs = ranks._Failure("ValueError: too little memory")
    monkeypatch.setattr(compat, "rank", lambda: 1)
    monkeypatch.setattr(compat, "gather", lambda value: told.append(value) or [value, theirs])
    with pytest.raises(RuntimeError, match="rank 1 failed: ValueError: too little memory"):
        found._size(lambda: 9 * MIB)
    assert told == [None]

    def short() -> int:
        raise ValueError("Available memory on node 1 is less than requested")

    for method in (found._size, found._load):
        with pytest.raises(ValueError, match="on node 1"):
            method(short)
    assert told == [None, *[ranks._Failure("ValueError: Available memory on node 1 is less than requested")] * 2]


@pytest.mark.parametrize("ranks_", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("where", ["weight_only", "_measure", "_offers", "_plan", "compile_paths", "held_bytes", "quicken"])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_whatever_fails_and_on_whichever_rank_a_server_starts_without_twins(
    two: tuple[Group, list[Life]], mode: Mode, where: str, ranks_: set[int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """No rank waits for one that failed: all end what they do in the same exchange, and make equally many afterwards."""
    from twinweight.engines.vllm import life as module

    group, lives = two
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    in_use = itertools.count(step=MIB)  # building takes some
    for name, value in {"weight_only": lambda kernels: ranks.gather(0) and kernels, "kernels_of": lambda model: model}.items():
        monkeypatch.setattr(module, name, value)
    for name, stub in {
        "kv_floor": lambda worker, floor: compat.KVFloor(10, 10 * MIB, MIB), "memory_in_use": lambda worker: next(in_use),
        "forward_context": lambda worker: nullcontext(), "draft_rows": lambda worker: 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(compat, name, stub)
    for found in lives:
        found.config = Config(mode)
        kernels = found.kernels
        found.worker.model_runner.get_model = lambda kernels=kernels: kernels
        monkeypatch.setattr(found, "_measure", lambda: ranks.gather({})[0])

    def failing(of: object, name: str) -> None:
        right = getattr(of, name)

        def maybe(*args: object, **more: object) -> object:
            if group.rank.value in ranks_:
                raise KeyError("a version of vLLM that we do not know")
            return right(*args, **more)

        monkeypatch.setattr(of, name, maybe)

    places: dict[str, list[object]] = {
        "weight_only": [module], "compile_paths": [own], "held_bytes": [own], "quicken": [module.heads],
    }  # fmt: skip
    monkeypatch.setattr(module.heads, "of", lambda worker: [])
    for of in places.get(where, lives):
        failing(of, where)

    def start(found: Life) -> None:
        with nullcontext() if mode == "soft" else pytest.raises((KeyError, ranks.OthersFailedError)):
            found._load(lambda: None)
        if mode == "soft":
            assert found._size(lambda: 9 * MIB) == 9 * MIB  # though that is less than the floor
            assert ranks.gather("in step") == ["in step"] * 2

    group.run(lives, start)
    if mode == "soft":
        assert [found.built for found in lives] == [{}, {}]
        assert all(kernel.twin is None and kernel.own is None for found in lives for kernel in found.kernels.values())
        assert [found.worker.model_runner.model_memory_usage for found in lives] == [100 * MIB] * 2
        assert times_logged(caplog, "goes on with vLLM's kernels alone") == 2
        assert "a version of vLLM that we do not know" in caplog.text
        assert f"rank {min(ranks_)} failed" in caplog.text or len(ranks_) == 2


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
    monkeypatch.setattr(module, "kind_of", lambda kernel: KIND)
    monkeypatch.setattr(module.measure, "known_or_measured", broken)
    with nullcontext() if mode == "soft" else pytest.raises(BudgetError, match="could not be timed"):
        assert found._measure() == {}
    assert "could not time the kernels" in caplog.text


def test_vllm_s_weights_go_where_a_copy_serves_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    found = life()
    routes = {"a": [0, Path.INT4, 64, Path.FUSED], "b": [0, Path.INT4, 64, Path.INNER], "c": [0, Path.INT4, 64, Path.TWIN]}
    for name, kernel in found.kernels.items():
        kernel.own, kernel.route = object(), routes[name]  # type: ignore[assignment]
        kernel.twin = kernel.twin if name == "c" else None
    charged: list[int] = []
    held = iter((100, 60, 60, 60))
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: next(held))
    monkeypatch.setattr(compat, "charge", lambda worker, nbytes: charged.append(nbytes))
    monkeypatch.setattr(spare, "free_one", lambda kernel: setattr(kernel, "freed", 20) or 20)
    for name in ("reload_weights", "sleep", "save_sharded_state"):
        setattr(found.worker, name, lambda *args: "done")
    assert spare.free(found.worker, found.kernels.values()) == 20  # type: ignore[arg-type]
    assert [name for name in "abc" if found.kernels[name].freed] == ["a"]
    assert spare.free(found.worker, found.kernels.values()) == 0  # type: ignore[arg-type]
    assert charged == [-40, 0]
    for name in ("reload_weights", "sleep", "save_sharded_state"):
        with pytest.raises(RuntimeError, match=r"no .* here.*int4 weights of vLLM freed"):
            getattr(found.worker, name)(1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("reload", "allocator", "frees"), [(False, None, True), (True, None, False), (False, object(), False)])
def test_what_is_freed_makes_room_for_more(
    reload: bool, allocator: object, frees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is freed where weights may be written again, or sleep."""
    from twinweight.engines.vllm import life as module

    found = life()
    found.config = Config("soft", reload=reload)
    kernels, kind = found.kernels, KIND
    option = TwinOption("own", MIB, 1.0, is_twin=False)

    def one_more() -> Plan:
        return Plan(
            "soft", Budget(1 << 30, 1 << 30), dict.fromkeys([n for n in kernels if n not in found.built][:1], option), {}
        )

    def freed(worker: object, served: list[FakeKernel]) -> int:
        new = [kernel for kernel in served if not kernel.freed]
        for kernel in new:
            kernel.freed = MIB
        return len(new) * MIB

    for name, value in {
        "kernels_of": lambda model: kernels, "weight_only": lambda kernels: kernels, "kind_of": lambda kernel: kind,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.heads, "of", lambda worker: [])
    monkeypatch.setattr(module, "offer", lambda *args: "with inner")
    monkeypatch.setattr(module, "without_inner", lambda offer, workload: "without")
    monkeypatch.setattr(compat, "forward_context", lambda worker: nullcontext())
    monkeypatch.setattr(compat, "draft_rows", lambda worker: 1)
    monkeypatch.setattr(compat, "chunk", lambda worker: 2048)
    monkeypatch.setattr(compat, "kv_floor", lambda worker, floor: found.floor)
    monkeypatch.setattr(compat, "sleeper", lambda worker: allocator)
    monkeypatch.setattr(spare, "free", freed)
    monkeypatch.setattr(found, "_measure", dict)
    monkeypatch.setattr(found, "_kinds", lambda kernel: ([], []))
    monkeypatch.setattr(found, "_plan", one_more)
    built = lambda: found.built.update({name: Built("own", MIB) for name in found.plan.twins})  # noqa: E731
    monkeypatch.setattr(found, "_build", built)
    found._load(lambda: None)
    assert list(found.built) == list(found.plan.twins) == (list("abc") if frees else ["a"])
    assert found.offers == {kind: "without" if frees else "with inner"}
    assert [bool(kernel.freed) for kernel in kernels.values()] == [frees] * 3


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("freed", [MIB, 0])
def test_what_was_built_before_stays_when_a_copy_fails(
    freed: int, two: tuple[Group, list[Life]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not compared again: vLLM's weight may be gone."""
    group, lives = two
    compared: list[str] = []
    for found in lives:
        a = found.kernels["a"]
        a.own, a.twin, a.freed, a.route = object(), None, freed, [0, Path.INT4]  # type: ignore[assignment]
        found.built = {"a": Built("own", MIB)}
        found.plan = Plan("soft", found.plan.budget, {n: o for n, o in found.plan.twins.items() if n != "a"}, {})
    monkeypatch.setattr(own, "agrees", lambda kernel: compared.append(kernel.place[1]) or kernel.place[1] != "c")
    group.run(lives)
    for found in lives:
        assert found.built["a"] == Built("own", MIB)
        assert found.kernels["a"].own is not None
        assert found.kernels["c"].own is None
    assert "a" not in compared


@pytest.mark.parametrize(("request_", "left"), [("fp8-row", ["fp8-row"]), ("fp8-exact", []), ("fp8", ["fp8-row"])])
def test_without_a_copy_8_bit_twins_come_from_the_dense_weight(
    request_: str, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from twinweight.engines.vllm import life as module

    found, kernel = life(), SimpleNamespace(inner=object())
    found.config = Config("soft", dtype=request_)
    kinds = {"fp8": ["fp8-row", "fp8-exact"]}.get(request_, [request_])
    monkeypatch.setattr(module, "shape_of", lambda kernel: None)
    monkeypatch.setattr(module, "lossy_kinds", lambda shape, request: (list(kinds), []))
    for copy, expected in ((True, kinds), (False, left)):
        monkeypatch.setattr(own, "can_have", lambda kernel, copy=copy: copy)
        twins, reasons = found._kinds(kernel)  # type: ignore[arg-type]
        assert twins == expected
        gone = [kind for kind in kinds if kind not in expected]
        assert reasons == [f"{kind}: the int4 weight cannot be read back from object" for kind in gone]


@pytest.mark.parametrize(
    ("invariant", "offloaded", "elastic", "why"),
    [
        (False, 0, False, None),
        (True, 0, False, "VLLM_BATCH_INVARIANT"),
        (False, 4, False, "no room for twins"),
        (False, 0, True, "elastic expert parallelism"),
    ],
)
def test_servers_in_which_there_are_no_twins(
    invariant: bool, offloaded: int, elastic: bool, why: str | None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", invariant, raising=False)
    offload = SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=offloaded), prefetch=SimpleNamespace(offload_group_size=0))
    config = SimpleNamespace(offload_config=offload, parallel_config=SimpleNamespace(enable_elastic_ep=elastic))
    assert compat.allows_twins(config) is (why is None)
    assert (why is None) == (caplog.text == "")
    assert (why or "") in caplog.text


@pytest.mark.usefixtures("alone")
def test_only_what_is_really_there_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An 8-bit twin of a weight that cannot be read back is not."""
    found = life()
    forms = {"a": "bfloat16", "b": "fp8-exact"}
    found.plan = Plan("soft", Budget(1 << 30, 1 << 30), {n: TwinOption(form, 9 * MIB, 1.0) for n, form in forms.items()}, {})
    found.built = {}

    def fill(kernel: Any) -> None:
        if kernel is found.kernels["b"]:
            raise build.Unreadable("the int4 weight behind Inner cannot be read back")

    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    monkeypatch.setattr(own, "held_bytes", lambda kernel: 4 * MIB)
    monkeypatch.setattr(build, "allocate", lambda kernel, form: True)
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
    found.built = {}
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

    def allocate(kernel: Any, form: str) -> bool:
        if kernel is found.kernels["a"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    monkeypatch.setattr(compat, "pool", pool)
    monkeypatch.setattr(compat, "memory_in_use", lambda worker: 0)
    monkeypatch.setattr(build, "allocate", allocate)
    monkeypatch.setattr(build, "fill", lambda kernel: None)
    monkeypatch.setattr(own, "held_bytes", lambda kernel: 5)
    monkeypatch.setattr(found, "_route", lambda kernel, form: Route.always(Path.TWIN))
    options = {name: TwinOption("bfloat16", MIB, saved) for name, saved in (("a", 1.0), ("b", 3.0), ("c", 2.0))}
    found.plan, found.built = Plan("soft", Budget(1 << 30, 1 << 30), options, {}), {}
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
    assert times_logged(caplog, "stays off in 0.99.1") == (mode == "soft")


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
