"""What a layer in vLLM could have, and what is made of the times. Needs no vLLM, and no GPU."""

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

from twinweight import crossover
from twinweight.cache import Cache
from twinweight.engines.vllm import compat, measure, own
from twinweight.kernels.tiles import AmpereTiles, DeviceTraits, HopperTiles, fused_tiles
from twinweight.measured import Measured
from twinweight.search import grid
from twinweight.timing import Timing
from twinweight.workload import HEAD_ROWS, Workload

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


def machete() -> Measured:
    return measured(
        int4=[30, 30, 100, 180, 350], own=[20, 28, 200, 400, 800], fused=[25, 28, 80, 200, 360],
        stream=[150, 150, 180, 240, 420], twin_bfloat16=[60, 60, 100, 170, 340],
    )  # fmt: skip


def test_full_steps_take_the_fastest_path_whatever_fewer_rows_take() -> None:
    """51200 x 5120 on an H200: Machete is ahead of `fused` at 160 rows and at 1024 to 8192."""
    ms = (1, 64, 160, 320, 1024, 8192, 16384)
    us = {
        "int4": (60, 110, 150, 300, 800, 6400, 13000), "own": (55, 130, 400, 800, 2500, 20000, 40000),
        "fused": (60, 90, 160, 280, 850, 6500, 12100), "stream": (500, 500, 520, 550, 1000, 6600, 12900),
        "twin:bfloat16": (200, 210, 230, 330, 900, 6600, 12900),
    }  # fmt: skip
    times = {name: tuple(Timing(t / 1e6, t / 1e6, t / 1e6) for t in ts) for name, ts in us.items()}
    found = measure.offer(layer("cuda"), Measured(ms, times, N), None, 0, layers=256)
    copy = next(form for form in found.forms if form.name == "own")
    assert str(found.route(copy)) == (
        "int4 from M=1, fused from M=64, inner from M=160, fused from M=320, inner from M=1024, fused from M=16384"
    )


def test_a_layer_on_a_gpu_may_have_a_twin_a_copy_or_both() -> None:
    twin, copy, both = measure.forms_of(layer("cuda"), [])
    assert (twin.name, copy.name, both.name) == ("bfloat16", "own", "own+bfloat16")
    assert copy.nbytes == N * K // 2 + N * K // 128 * 2
    assert twin.nbytes + copy.nbytes == both.nbytes
    assert (twin.is_twin, copy.is_twin, both.is_twin) == (True, False, True)


def test_a_layer_that_cannot_have_a_copy_has_a_kind_of_its_own_and_the_same_times() -> None:
    same, without = layer("cuda"), layer("cuda")
    for found in (same, without):
        found.config.weight_type = "uint4b8"
    without.copyable = False
    assert measure.kind_of(without) != measure.kind_of(same)
    assert measure.kind_of(without).timed == measure.kind_of(same)
    assert measure.kind_of(without).key == measure.kind_of(same).key
    without.config.weight_type = SimpleNamespace(size_bits=4)
    assert [form.name for form in measure.forms_of(without, [])] == ["bfloat16"]


def test_what_is_ours_counts_as_slower_in_a_server_than_alone() -> None:
    alone = machete()
    decodes = 1.05, 1.1, 1.1, 1, 1
    for layers, streams in ((128, 1), (192, 1), (256, 1.25)):  # of a model whose launches no longer fit the queue
        expected = measure.in_a_server(alone, layers)
        known = {"own": decodes, "fused": decodes, "stream": (streams,) * 5, "int4": (1,) * 5, "twin:bfloat16": (1,) * 5}
        for choice, factors in known.items():
            ratios = [b.min / a.min for a, b in zip(alone.times[choice], expected.times[choice], strict=True)]
            assert ratios == pytest.approx(factors), choice


@pytest.mark.parametrize(("layers", "path"), [(128, "stream"), (256, "fused")])
def test_a_model_whose_launches_do_not_fit_a_queue_streams_only_where_that_is_far_ahead(layers: int, path: str) -> None:
    own = [20, 28, 200, 400, 800]
    found = measured(int4=[30, 30, 100, 180, 350], own=own, fused=[20, 25, 80, 160, 320], stream=[150, 150, 180, 150, 300])
    route = measure.offer(layer("cuda"), found, None, 0, layers=layers).route
    assert str(route(measure.forms_of(layer("cuda"), [])[1])).split(", ")[-1].startswith(path)
    behind = measured(int4=[30, 30, 100, 380, 750], own=own, fused=[20, 25, 180, 360, 720], stream=[150, 150, 180, 190, 300])
    route = measure.offer(layer("cuda"), behind, None, 0, layers=layers).route
    assert str(route(measure.forms_of(layer("cuda"), [])[1])).split(", ")[-1].startswith("stream")


def test_paths_of_a_copy_and_of_vllm_take_turns() -> None:
    offer = measure.offer(layer("cuda"), machete(), None, 0)
    assert [str(offer.route(form)) for form in (None, *offer.forms)] == [
        "int4 from M=1",
        "int4 from M=1, twin from M=512",
        "int4 from M=1, inner from M=32, fused from M=256, inner from M=512",
        "int4 from M=1, inner from M=32, fused from M=256, twin from M=512",
    ]
    saved = {o.name: o.saved_us for o in offer.options(Workload.of({1: 1, 256: 1, 512: 2}))}
    assert saved == pytest.approx({"bfloat16": 2 * 10 / 4, "own": (9 + 12) / 4, "own+bfloat16": (9 + 12 + 2 * 10) / 4})


@pytest.mark.parametrize(
    ("inner", "calls", "without"),
    [
        ([30, 27, 200, 400, 800], {1: 1, 512: 1}, True),  # ahead at 32 rows, by a tenth with what a server adds
        ([30, 24, 200, 400, 800], {1: 1, 512: 1}, False),  # by a quarter
        ([30, 27, 200, 190, 355], {1: 8, 512: 1}, False),  # and at the size that the workload has
        ([30, 27, 200, 190, 355], {1: 8, 1024: 1}, True),
    ],
)
def test_a_copy_does_without_the_inner_kernel_where_that_costs_little(
    inner: list[float], calls: dict[int, float], without: bool
) -> None:
    times = measured(
        int4=inner, own=[20, 27, 300, 500, 900], fused=[25, 30, 80, 200, 360], stream=[150] * 2 + [180, 240, 420],
        twin_bfloat16=[60, 60, 100, 170, 340],
    )  # fmt: skip
    offer = measure.offer(layer("cuda"), times, None, 0)
    changed = measure.without_inner(offer, Workload.of(calls))
    assert "inner" in str(offer.route(offer.forms[1]))
    assert ("inner" not in str(changed.route(changed.forms[1]))) is without
    assert [f.name for f in changed.forms] == [f.name for f in offer.forms]
    assert (changed.forms[0], changed.forms[2]) == (offer.forms[0], offer.forms[2])
    given = measure.offer(layer("cuda"), None, 9, 0)
    assert measure.without_inner(given, Workload.of(calls)) == given


def test_an_output_head_gets_a_copy_for_decode_and_no_twin_for_prompts() -> None:
    """Of a prompt it multiplies the last row, of a step of many rows as many as prompts end in it."""
    head, other = layer("cuda"), layer("cuda")
    head.layer.org_vocab_size = N
    assert measure.kind_of(head) != measure.kind_of(other)
    assert measure.kind_of(head).timed == measure.kind_of(other)
    assert measure.kind_of(head).key == measure.kind_of(other).key
    chunks = Workload.prefill(1024)
    found = {name: measure.offer(kernel, machete(), None, 0) for name, kernel in (("head", head), ("other", other))}
    twin, copy, both = found["head"].options(chunks)
    assert (twin.saved_us, both.saved_us) == (0, copy.saved_us)
    assert found["head"].options(chunks) == found["other"].options(Workload.prefill(HEAD_ROWS))
    assert found["other"].options(chunks)[0].saved_us > 0
    assert found["head"].gains(chunks).keys() == {1024}
    assert found["head"].route(found["head"].forms[0]) == found["other"].route(found["other"].forms[0])
    assert measure.offer(head, None, 9, 0).forms == ()
    assert measure.offer(other, None, 9, 0).forms != ()


def test_a_head_does_without_the_inner_kernel_only_where_it_may_at_all_rows() -> None:
    head = layer("cuda")
    head.layer.org_vocab_size = N
    times = measured(int4=[30, 30, 60, 100, 200], own=[20, 28, 99, 400, 800], fused=[25, 28, 80, 200, 360], stream=[150] * 5)
    offer = measure.offer(head, times, None, 0)
    changed = measure.without_inner(offer, Workload.of({1: 1.0}))
    assert changed.forms == offer.forms


def test_a_drafting_server_decodes_by_decode_kernels() -> None:
    found = measured(int4=[30] * 5, own=[20] * 5, fused=[10] * 5, stream=[99] * 5, twin_bfloat16=[99] * 5)
    offer = measure.offer(layer("cuda"), found, None, least=6)
    assert str(offer.route(offer.forms[1])) == "inner from M=1, fused from M=6"


def test_what_was_not_timed_is_not_offered() -> None:
    found = measured(int4=[30] * 5, stream=[20] * 5, twin_bfloat16=[10] * 5)
    assert [form.name for form in measure.offer(layer("cuda"), found, None, 0).forms] == ["bfloat16"]


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
    monkeypatch.setattr(measure, "measure", lambda *args: asked.append(1) or Measured.from_json(found.to_json()))
    kind = measure.Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
    for kinds in ([], [], ["fp8-row"]):
        measure.known_or_measured({kind: [layer("meta")] * 99}, lambda kernel, kinds=kinds: kinds, store)  # type: ignore[misc]
    assert asked == [1, 1]  # an 8-bit twin was not tried


def test_kinds_that_are_not_known_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(int4=[1] * 5, own=[1] * 5, stream=[1] * 5, twin_bfloat16=[1] * 5)
    asked: list[tuple[object, float]] = []

    def timed(layers: list[object], lossy: object, seconds: float, most: int) -> Measured:
        asked.append((layers[0], seconds))
        return times

    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "measure", timed)
    monkeypatch.setattr(measure.own, "can_have", lambda kernel: True)
    monkeypatch.setattr(measure, "compile_together", lambda calls: pytest.fail("a CPU has no kernels to compile"))
    wide, tall = (measure.Kind(n, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner") for n in (N, 2 * N))
    layers: dict[measure.Kind, list[Any]] = {wide: [layer("cpu")], tall: [layer("cpu")]}
    store = Cache(tmp_path)
    assert measure.known_or_measured({wide: layers[wide]}, lambda kernel: [], store) == {wide: times}
    assert asked == [(layers[wide][0], measure.SECONDS)]
    assert set(measure.known_or_measured(layers, lambda kernel: [], store)) == {wide, tall}
    assert asked[1:] == [(layers[tall][0], measure.SECONDS)]  # what is known takes none of it
    measure.known_or_measured(layers, lambda kernel: [], store)
    measure.known_or_measured(layers, lambda kernel: [], None)
    assert asked[2:] == [(layers[kind][0], measure.SECONDS / 2) for kind in (wide, tall)]


def test_times_that_a_limit_cut_short_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([dataclasses.replace(TIMES, whole=False), TIMES])
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "measure", lambda *args: next(found))
    kind = measure.Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
    kept = [measure.known_or_measured({kind: [layer("cpu")]}, lambda kernel: [], Cache(tmp_path))[kind] for _ in range(3)]
    assert [times.whole for times in kept] == [False, True, True]


def test_times_of_layers_that_caches_may_hold_are_for_as_few_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = Cache(tmp_path), []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "measure", lambda layers, *args: asked.append(len(layers)) or TIMES)
    kind = measure.Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
    for layers in (2, 2, 3, 6, 9, 2):  # calls rotate over six of such layers on a CPU
        measure.known_or_measured({kind: [layer("cpu")] * layers}, lambda kernel: [], store)
    assert asked == [2, 3, 6]


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
    for device in ("meta", "cpu"):
        monkeypatch.setattr(
            measure, "measure", lambda layers, lossy, seconds, most, on=device: asked.append((on, most)) or times
        )
        kind = measure.Kind(N, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner")
        for most in (2048, 8192, 16384, 8192, 32768):
            measure.known_or_measured({kind: [layer(device)] * 99}, lambda kernel: [], store, most)
    assert asked == [("meta", 2048), ("meta", 16384), ("cpu", 2048)]


def test_times_depend_on_what_inner_kernels_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    for value in ("", "0", "1"):
        monkeypatch.setenv("VLLM_HUMMING_USE_F16_ACCUM", value)
        kinds.add(measure.kind_of(layer("cpu")))
    assert len(kinds) == len({json.dumps(kind.key, sort_keys=True) for kind in kinds}) == 3
    assert len({str(kind) for kind in kinds}) == 1


@pytest.mark.parametrize(("group_size", "copy"), [(128, True), (-1, True), (32, True), (16, False), (K, True), (192, False)])
def test_groups_that_our_kernels_do_not_take_have_no_copy_and_are_timed_all_the_same(group_size: int, copy: bool) -> None:
    kernel = layer("cuda")
    kernel.config.group_size = group_size
    assert own.can_have(kernel) is copy
    assert [form.name for form in measure.forms_of(kernel, [])] == ["bfloat16", *(["own", "own+bfloat16"] if copy else [])]
    kernel.device = torch.device("cpu")
    assert (
        crossover.variants(measure.shape_of(kernel), N, ["twin:bfloat16"])["twin:bfloat16"](torch.ones(1, K).bfloat16())
        is not None
    )


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
        if isinstance(t, AmpereTiles):
            return dataclasses.astuple(dataclasses.replace(t, split_k=min(t.split_k, 2)))
        return dataclasses.astuple(t)

    ahead = {kernel(m) for m in own.sizes(16384)}
    assert {kernel(m) for m in (*range(1, 1100), *range(1100, 16385, 37))} <= ahead


def test_what_is_compiled_ahead_ends_with_the_most_rows_of_a_step() -> None:
    assert own.sizes(2048) == [m for m in own.SIZES if m <= 2048 + 64]
    assert own.sizes(1 << 20) == list(own.SIZES)


def test_kernels_of_all_kinds_are_compiled_before_the_first_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(compat, "version", lambda: "0.0")
    monkeypatch.setattr(measure, "measure", lambda *args: seen.append("timed"))
    monkeypatch.setattr(measure, "compile_together", lambda calls: seen.extend(f"{call.args[0]}" for call in calls))
    monkeypatch.setattr(measure, "launches", lambda kernel, most: iter([functools.partial(print, kernel.n)]))
    kinds = [measure.Kind(n, K, 128, "uint4b8", False, False, torch.bfloat16, "Inner") for n in (N, 2 * N)]
    measure.known_or_measured({kind: [layer("meta")] for kind in kinds}, lambda kernel: [], None)
    assert seen == [str(N), str(N), "timed", "timed"]
