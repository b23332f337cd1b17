"""What a layer in vLLM could have, and what is made of the times. Needs no vLLM, and no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.engines.test_vllm_measure import K, N, layer, measured
from twinweight.engines.vllm import offers
from twinweight.engines.vllm.kinds import kind_of
from twinweight.measured import Measured
from twinweight.paths import Path
from twinweight.timing import Timing
from twinweight.workload import HEAD_ROWS, Workload


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
    found = offers.offer(layer("cuda"), Measured(ms, times, N), None, 0, layers=256)
    copy = next(form for form in found.forms if form.name == "own")
    assert str(found.route(copy)) == (
        "int4 from M=1, fused from M=64, inner from M=160, fused from M=320, inner from M=1024, fused from M=16384"
    )


def test_a_layer_on_a_gpu_may_have_a_twin_a_copy_or_both() -> None:
    twin, copy, both = offers.forms_of(layer("cuda"), [])
    assert (twin.name, copy.name, both.name) == ("bfloat16", "own", "own+bfloat16")
    assert copy.nbytes == N * K // 2 + N * K // 128 * 2
    assert twin.nbytes + copy.nbytes == both.nbytes
    assert (twin.is_twin, copy.is_twin, both.is_twin) == (True, False, True)


def test_the_inner_kernel_comes_back_behind_a_twin_that_is_ahead_for_a_few_rows() -> None:
    """As on a CPU with AMX."""
    times = measured(
        int4=[30, 40, 80, 150, 300], own=[10, 90, 700, 1500, 3000], stream=[500] * 5, twin_bfloat16=[32, 30, 90, 170, 340]
    )
    twin, _, both = offers.forms(N * K // 2, {"bfloat16": 2 * N * K}, ((offers.OWN, Path.INT4), (offers.INT4, Path.INNER)))
    found = offers.costs(times, [twin, both], N, on_gpu=False)
    assert str(found.route(twin)) == "int4 from M=1, twin from M=32, int4 from M=256"
    assert str(found.route(both)) == "int4 from M=1, twin from M=32, inner from M=256"


def test_a_layer_that_cannot_have_a_copy_has_a_kind_of_its_own_and_the_same_times() -> None:
    same, without = layer("cuda"), layer("cuda")
    for found in (same, without):
        found.config.weight_type = "uint4b8"
    without.copyable = False
    assert kind_of(without) != kind_of(same)
    assert kind_of(without).timed == kind_of(same)
    assert kind_of(without).key == kind_of(same).key
    without.config.weight_type = SimpleNamespace(size_bits=4)
    assert [form.name for form in offers.forms_of(without, [])] == ["bfloat16"]


def test_what_is_ours_counts_as_slower_in_a_server_than_alone() -> None:
    alone = machete()
    decodes = 1.05, 1.1, 1.1, 1, 1
    for layers, streams in ((128, 1), (192, 1), (256, 1.25)):  # of a model whose launches no longer fit the queue
        expected = offers.in_a_server(alone, layers)
        known = {"own": decodes, "fused": decodes, "stream": (streams,) * 5, "int4": (1,) * 5, "twin:bfloat16": (1,) * 5}
        for choice, factors in known.items():
            ratios = [b.min / a.min for a, b in zip(alone.times[choice], expected.times[choice], strict=True)]
            assert ratios == pytest.approx(factors), choice


@pytest.mark.parametrize(("layers", "path"), [(128, "stream"), (256, "fused")])
def test_a_model_whose_launches_do_not_fit_a_queue_streams_only_where_that_is_far_ahead(layers: int, path: str) -> None:
    own = [20, 28, 200, 400, 800]
    found = measured(int4=[30, 30, 100, 180, 350], own=own, fused=[20, 25, 80, 160, 320], stream=[150, 150, 180, 150, 300])
    route = offers.offer(layer("cuda"), found, None, 0, layers=layers).route
    assert str(route(offers.forms_of(layer("cuda"), [])[1])).split(", ")[-1].startswith(path)
    behind = measured(int4=[30, 30, 100, 380, 750], own=own, fused=[20, 25, 180, 360, 720], stream=[150, 150, 180, 190, 300])
    route = offers.offer(layer("cuda"), behind, None, 0, layers=layers).route
    assert str(route(offers.forms_of(layer("cuda"), [])[1])).split(", ")[-1].startswith("stream")


def test_paths_of_a_copy_and_of_vllm_take_turns() -> None:
    offer = offers.offer(layer("cuda"), machete(), None, 0)
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
    offer = offers.offer(layer("cuda"), times, None, 0)
    changed = offers.without_inner(offer, Workload.of(calls))
    assert "inner" in str(offer.route(offer.forms[1]))
    assert ("inner" not in str(changed.route(changed.forms[1]))) is without
    assert [f.name for f in changed.forms] == [f.name for f in offer.forms]
    assert (changed.forms[0], changed.forms[2]) == (offer.forms[0], offer.forms[2])
    given = offers.offer(layer("cuda"), None, 9, 0)
    assert offers.without_inner(given, Workload.of(calls)) == given


def test_an_output_head_gets_a_copy_for_decode_and_no_twin_for_prompts() -> None:
    """Of a prompt it multiplies the last row, of a step of many rows as many as prompts end in it."""
    head, other = layer("cuda"), layer("cuda")
    head.layer.org_vocab_size = N
    assert kind_of(head) != kind_of(other)
    assert kind_of(head).timed == kind_of(other)
    assert kind_of(head).key == kind_of(other).key
    chunks = Workload.prefill(1024)
    found = {name: offers.offer(kernel, machete(), None, 0) for name, kernel in (("head", head), ("other", other))}
    (copy,) = found["head"].options(chunks)
    assert copy == found["other"].options(Workload.prefill(HEAD_ROWS))[1]
    assert copy.saved_us > 0
    assert found["other"].options(chunks)[0].saved_us > 0
    assert found["head"].gains(chunks).keys() == {1024}
    assert found["head"].route(found["head"].forms[0]) == found["other"].route(found["other"].forms[1])
    # Nor where a twin was timed as faster for few rows, as on a CPU with AMX it may be.
    soon = measured(int4=[30] * 5, own=[20] * 5, fused=[20] * 5, stream=[150] * 5, twin_bfloat16=[10] * 5)
    assert [form.name for form in offers.offer(head, soon, None, 0).forms] == ["own"]
    assert offers.offer(head, None, 9, 0).forms == ()
    assert offers.offer(other, None, 9, 0).forms != ()


def test_a_head_does_without_the_inner_kernel_only_where_it_may_at_all_rows() -> None:
    head = layer("cuda")
    head.layer.org_vocab_size = N
    times = measured(int4=[30, 30, 60, 100, 200], own=[20, 28, 99, 400, 800], fused=[25, 28, 80, 200, 360], stream=[150] * 5)
    offer = offers.offer(head, times, None, 0)
    changed = offers.without_inner(offer, Workload.of({1: 1.0}))
    assert changed.forms == offer.forms


def test_a_drafting_server_decodes_by_decode_kernels() -> None:
    found = measured(int4=[30] * 5, own=[20] * 5, fused=[10] * 5, stream=[99] * 5, twin_bfloat16=[99] * 5)
    offer = offers.offer(layer("cuda"), found, None, least=6)
    assert str(offer.route(offer.forms[1])) == "inner from M=1, fused from M=6"


def test_what_was_not_timed_is_not_offered() -> None:
    found = measured(int4=[30] * 5, stream=[20] * 5, twin_bfloat16=[10] * 5)
    assert [form.name for form in offers.offer(layer("cuda"), found, None, 0).forms] == ["bfloat16"]
