"""How layers in vLLM are timed. Needs no vLLM, and no GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from twinweight import cache, crossover
from twinweight.cache import Cache
from twinweight.engines.vllm import compat, measure, offers, own
from twinweight.engines.vllm.kinds import Kind, kind_of, shape_of
from twinweight.kernels import gpu
from twinweight.kernels.forms import DeviceTraits, FewTiles, HopperTiles
from twinweight.kernels.prepared import KernelWeight
from twinweight.kernels.tiles import fused_tiles
from twinweight.measured import Measured
from twinweight.memory import Memory
from twinweight.paths import Path as Way
from twinweight.paths import Route
from twinweight.search import grid
from twinweight.timing import Timing

N, K = 256, 512


def layer(device: str) -> Any:
    """A 4-bit layer on a device."""
    config = SimpleNamespace(
        weight_type=SimpleNamespace(size_bits=4), zero_points=False, has_g_idx=False, group_size=128, act_type=torch.bfloat16
    )
    return SimpleNamespace(
        n=N, k=K, device=torch.device(device), config=config, dtype=torch.bfloat16, inner=object(), copyable=True,
        layer=SimpleNamespace(),
    )  # fmt: skip


def measured(**times: list[float]) -> Measured:
    """At 1, 32, 256, 512 and 1024 rows, in microseconds."""
    rows = {c.replace("twin_", "twin:"): tuple(Timing(t / 1e6, t / 1e6, t / 1e6) for t in ts) for c, ts in times.items()}
    return Measured((1, 32, 256, 512, 1024), rows, N)


TIMES = Measured((1, 512), {c: (Timing(1, 1, 1),) * 2 for c in ("int4", "own", "stream", "twin:bfloat16")}, N)


def test_a_kernel_that_does_not_compile_takes_no_other_along(caplog: pytest.LogCaptureFixture) -> None:
    rows: list[int] = []

    def broken(x: Tensor) -> object:
        raise NotImplementedError("no such instruction")

    calls = {"fused": broken, "stream": lambda x: rows.append(len(x))}
    with caplog.at_level(logging.WARNING, "vllm.twinweight"):
        ready, failed = measure._ready(calls, layer("meta"), 8192)
        assert (list(ready), failed) == (["stream"], ("fused",))
    assert set(rows) == set(grid(torch.device("meta")))
    assert list(measure._ready(calls, layer("meta"), 16384)[0]) == ["stream"]
    assert set(rows) == {*grid(torch.device("meta")), 16384}
    assert "does without fused" in caplog.text
    assert "no such instruction" in caplog.text


@pytest.mark.parametrize("bias", [None, torch.zeros(N)])
def test_what_a_route_launches_is_compiled_without_memory_for_it(bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def linear(name: str, x: Tensor, w: KernelWeight, added: Tensor | None) -> None:
        assert {x.device.type, w.packed.device.type} == {"meta"}
        assert (added is None) == (bias is None)
        asked.append((name, len(x)))

    monkeypatch.setattr(gpu, "int4_linear", functools.partial(linear, "int4"))
    monkeypatch.setattr(gpu, "fused_linear", functools.partial(linear, "fused"))
    monkeypatch.setattr(own, "compile_together", lambda calls: [call() for call in calls])
    kernel = layer("cpu")
    kernel.bias, kernel.own = bias, gpu.empty(N, K, 128, torch.bfloat16, torch.device("cpu"), symmetric=True)
    kernel.route = Route((0, 4, 32, 64), (Way.INT4, Way.FUSED, Way.INNER, Way.FUSED)).flat()
    own.compile_paths([kernel], 80)
    assert asked == [("fused", m) for m in (88, 80, 72, 64, 24, 16, 8, 7, 6, 5, 4)] + [("int4", m) for m in (3, 2, 1)]


def test_a_kernel_that_ran_out_of_memory_is_tried_again() -> None:
    def full(x: Tensor) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measure._ready({"fused": full}, layer("meta"), 0) == ({}, ())


def test_what_does_not_run_is_not_tried_at_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = Kept()
    found = dataclasses.replace(TIMES, failed=("fused",))
    asked: list[int] = []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "compile_together", lambda calls: None)
    monkeypatch.setattr(measure, "read_memory", lambda device: Memory(1 << 40, 1 << 40))
    monkeypatch.setattr(measure, "measure", lambda layers, *args: asked.append(1) or [Measured.from_json(found.to_json())])
    kind = Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
    for kinds in ([], [], ["fp8-row"]):
        measure.known_or_measured({kind: [layer("meta")] * 99}, lambda kernel, kinds=kinds: kinds, store)  # type: ignore[misc]
    assert asked == [1, 1]  # an 8-bit twin was not tried


def test_kinds_that_are_not_known_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(int4=[1] * 5, own=[1] * 5, stream=[1] * 5, twin_bfloat16=[1] * 5)
    asked: list[tuple[object, float]] = []

    def timed(layers: list[list[object]], lossy: object, seconds: float, most: int) -> list[Measured]:
        asked.extend((same[0], seconds) for same in layers)
        return [times for _ in layers]

    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "measure", timed)
    monkeypatch.setattr(measure.own, "can_have", lambda kernel: True)
    monkeypatch.setattr(measure, "compile_together", lambda calls: pytest.fail("a CPU has no kernels to compile"))
    wide, tall = (Kind(n, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner") for n in (N, 2 * N))
    layers: dict[Kind, list[Any]] = {wide: [layer("cpu")], tall: [layer("cpu")]}
    store = Cache(tmp_path)
    assert measure.known_or_measured({wide: layers[wide]}, lambda kernel: [], store) == {wide: times}
    assert asked == [(layers[wide][0], measure.SECONDS)]
    assert set(measure.known_or_measured(layers, lambda kernel: [], store)) == {wide, tall}
    assert asked[1:] == [(layers[tall][0], measure.SECONDS)]  # what is known takes none of it
    measure.known_or_measured(layers, lambda kernel: [], store)
    measure.known_or_measured(layers, lambda kernel: [], None)
    assert asked[2:] == [(layers[kind][0], measure.SECONDS / 2) for kind in (wide, tall)]


@pytest.mark.parametrize(("device", "measured_anew"), [("meta", [1, 2, 2]), ("cpu", [1, 1, 1])])
def test_times_that_a_limit_cut_short_are_kept_where_nothing_is_compiled(
    device: str, measured_anew: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start of a GPU has more time for the rest; a CPU's would take as long again, and again."""
    asked: list[Measured] = []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "compile_together", lambda calls: None)
    monkeypatch.setattr(own, "can_have", lambda kernel: False)
    monkeypatch.setattr(measure, "_at_once", lambda new, *args: [list(new)] if new else [])
    monkeypatch.setattr(cache, "describe", lambda device: {"type": device.type})

    def timed(*args: object) -> list[Measured]:
        asked.append(dataclasses.replace(TIMES, whole=bool(asked)))
        return asked[-1:]

    monkeypatch.setattr(measure, "measure", timed)
    kind = Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
    seen = []
    for _ in range(3):
        measure.known_or_measured({kind: [layer(device)]}, lambda kernel: [], Cache(tmp_path))
        seen.append(len(asked))
    assert seen == measured_anew


def test_times_of_layers_that_caches_may_hold_are_for_as_few_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = Cache(tmp_path), []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "measure", lambda layers, *args: asked.append(len(layers[0])) or [TIMES])
    kind = Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
    for layers in (2, 2, 3, 32, 40, 2):  # calls rotate over 32 of such layers on a CPU
        measure.known_or_measured({kind: [layer("cpu")] * layers}, lambda kernel: [], store)
    assert asked == [2, 3, 32]


class Kept:
    """A cache of times that knows no device."""

    def __init__(self) -> None:
        self.times: dict[str, Measured] = {}

    def read(self, key: dict[str, object], device: torch.device, vllm: str) -> Measured | None:
        return self.times.get(f"{key} {device}")

    def write(self, key: dict[str, object], device: torch.device, found: Measured, vllm: str) -> None:
        self.times[f"{key} {device}"] = found


def test_times_of_larger_steps_are_others_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = Kept()
    times = dataclasses.replace(TIMES, times={**TIMES.times, "fused": TIMES.times["int4"]})
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "compile_together", lambda calls: None)
    monkeypatch.setattr(measure, "read_memory", lambda device: Memory(1 << 40, 1 << 40))
    for device in ("meta", "cpu"):
        monkeypatch.setattr(
            measure, "measure", lambda layers, lossy, seconds, most, on=device: asked.append((on, most)) or [times]
        )
        kind = Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
        for most in (2048, 8192, 16384, 8192, 32768):
            measure.known_or_measured({kind: [layer(device)] * 99}, lambda kernel: [], store, most)
    assert asked == [("meta", 2048), ("meta", 16384), ("cpu", 2048)]


def test_times_depend_on_what_inner_kernels_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    for value in ("", "0", "1"):
        monkeypatch.setenv("VLLM_HUMMING_USE_F16_ACCUM", value)
        kinds.add(kind_of(layer("cpu")))
    assert len(kinds) == len({json.dumps(kind.key, sort_keys=True) for kind in kinds}) == 3
    assert len({str(kind) for kind in kinds}) == 1


@pytest.mark.parametrize(("group_size", "copy"), [(128, True), (-1, True), (32, True), (16, False), (K, True), (192, False)])
def test_groups_that_our_kernels_do_not_take_have_no_copy_and_are_timed_all_the_same(group_size: int, copy: bool) -> None:
    kernel = layer("cuda")
    kernel.config.group_size = group_size
    assert own.can_have(kernel) is copy
    assert [form.name for form in offers.forms_of(kernel, [])] == ["bfloat16", *(["own", "own+bfloat16"] if copy else [])]
    kernel.device = torch.device("cpu")
    assert crossover.variants(shape_of(kernel), N, ["twin:bfloat16"])["twin:bfloat16"](torch.ones(1, K).bfloat16()) is not None


H200 = DeviceTraits("nvidia", 32, 132, 232448, rounds_bf16=True, ptx=True, wgmma=True, gluon=True)
SHAPES = (
    (4096, 4096), (4096, 14336), (28672, 4096), (8192, 8192), (51200, 5120), (5120, 25600), (2048, 2048), (16384, 2048),
    (3584, 18944), (896, 4864), (1536, 8960), (9728, 896),
)  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_no_prompt_waits_for_a_kernel_that_was_not_compiled_ahead(n: int, k: int, zeros: bool) -> None:
    """On Hopper, whose tiles have the most forms."""

    def kernel(m: int) -> tuple[object, ...]:
        t = fused_tiles(m, n, k, 128, H200, zeros)
        tiles = -(-m // t.rows) * -(-n // t.block_n)
        if isinstance(t, HopperTiles):
            return t.block_m, t.more_m, t.block_n, t.split_k > 1 and tiles > t.whole, t.group_n, t.num_warps, t.registers
        if isinstance(t, FewTiles):
            return dataclasses.astuple(dataclasses.replace(t, split_k=min(t.split_k, 2), whole=0))
        return dataclasses.astuple(t)

    ahead = {kernel(m) for m in own.sizes(16384)}
    assert {kernel(m) for m in (*range(1, 1100), *range(1100, 16385, 37))} <= ahead


def test_what_is_compiled_ahead_ends_with_the_most_rows_of_a_step() -> None:
    assert own.sizes(2048) == [m for m in own.SIZES if m <= 2048 + 64]
    assert own.sizes(1 << 20) == list(own.SIZES)


def test_kernels_of_all_kinds_are_compiled_before_the_first_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "read_memory", lambda device: Memory(1 << 40, 1 << 40))
    monkeypatch.setattr(measure, "measure", lambda layers, *args: seen.append("timed") or [TIMES] * len(layers))
    monkeypatch.setattr(measure, "compile_together", lambda calls: seen.extend(f"{call.args[0]}" for call in calls))
    monkeypatch.setattr(measure, "launches", lambda kernel, most: iter([functools.partial(print, kernel.n)]))
    kinds = [Kind(n, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner") for n in (N, 2 * N)]
    measure.known_or_measured({kind: [layer("meta")] for kind in kinds}, lambda kernel: [], None)
    assert seen == [str(N), str(N), "timed"]


@pytest.mark.parametrize(
    ("device", "free", "groups"),
    [("meta", 1 << 40, [3]), ("meta", 5 << 30, [2, 1]), ("meta", 1, [1, 1, 1]), ("cpu", 1 << 40, [1, 1, 1])],
)
def test_kinds_are_timed_at_once_where_memory_allows_it(
    device: str, free: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.2 GB each here: twins and copies to rotate over, activations and products of 8192 rows."""
    asked: list[int] = []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "compile_together", lambda calls: None)
    monkeypatch.setattr(measure, "read_memory", lambda device: Memory(1 << 40, free))
    monkeypatch.setattr(measure, "measure", lambda layers, *args: asked.append(len(layers)) or [TIMES] * len(layers))
    kernel = layer(device)
    kernel.n = kernel.k = 16384
    kinds = [Kind(n, 16384, 128, "uint4b8", False, False, torch.bfloat16, "Inner") for n in (1, 2, 3)]
    assert set(measure.known_or_measured({kind: [kernel] for kind in kinds}, lambda kernel: [], None, 8192)) == set(kinds)
    assert asked == groups
