"""Recorded traces and what they hold. Times and calls were summed by other means: on the H200 over kernels by External id, on
the CPU over the spans of `twinweight::linear`; FLOPs and bytes follow from the shapes.

CPU: models/stdlib-15m, 64 tokens in, 3 out. H200: vLLM 0.26; eager: 4 layers of a Llama-3.1-8B shape; graphs: 16 layers of a
Qwen3-32B shape; 512 tokens in, 9 out. All stripped by `strip.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from twinweight.roofline.run import roofline

DATA = Path(__file__).parents[1] / "data" / "roofline"
INT4, MACHETE = "aten::_weight_int4pack_mm_for_cpu", "_C::machete_mm"

# (op, MxNxK, phase) of every linear -> calls, microseconds
Table = Mapping[tuple[str, str, str], tuple[int, float]]
LINEARS: dict[str, Table] = {
    "cpu-off": {
        (INT4, "64x1152x384", "prefill"): (16, 5512.382), (INT4, "64x384x1152", "prefill"): (8, 2736.484),
        (INT4, "64x384x384", "prefill"): (16, 2257.451), (INT4, "64x128x384", "prefill"): (16, 1015.486),
        (INT4, "1x1152x384", "decode"): (32, 1262.606), (INT4, "1x384x1152", "decode"): (16, 532.226),
        (INT4, "1x384x384", "decode"): (32, 898.293), (INT4, "1x128x384", "decode"): (32, 624.011),
        ("aten::mm", "1x4096x384", "prefill"): (1, 344.244), ("aten::mm", "1x4096x384", "decode"): (2, 594.277),
    },
    "cpu-on": {
        ("aten::mm", "64x1152x384", "prefill"): (16, 3430.891), ("aten::mm", "64x384x1152", "prefill"): (8, 1477.206),
        ("aten::mm", "64x384x384", "prefill"): (16, 2126.895), ("aten::mm", "64x128x384", "prefill"): (16, 914.335),
        (INT4, "1x1152x384", "decode"): (32, 1171.328), (INT4, "1x384x1152", "decode"): (16, 497.491),
        (INT4, "1x384x384", "decode"): (32, 931.553), (INT4, "1x128x384", "decode"): (32, 700.02),
        ("aten::mm", "1x4096x384", "prefill"): (1, 236.523), ("aten::mm", "1x4096x384", "decode"): (2, 597.282),
    },
    "h200-eager-off": {
        (MACHETE, "512x28672x4096", "prefill"): (4, 653.5), (MACHETE, "512x4096x14336", "prefill"): (4, 355.774),
        (MACHETE, "512x6144x4096", "prefill"): (4, 179.84), (MACHETE, "512x4096x4096", "prefill"): (4, 119.136),
        (MACHETE, "1x28672x4096", "decode"): (32, 925.596), (MACHETE, "1x4096x14336", "decode"): (32, 714.649),
        (MACHETE, "1x6144x4096", "decode"): (32, 461.857), (MACHETE, "1x4096x4096", "decode"): (32, 440.478),
        ("aten::mm", "1x128256x4096", "prefill"): (1, 255.136), ("aten::mm", "1x128256x4096", "decode"): (8, 1971.896),
    },
    "h200-eager-on": {
        (MACHETE, "512x28672x4096", "prefill"): (4, 649.567), ("aten::mm", "512x4096x14336", "prefill"): (4, 295.741),
        ("aten::mm", "512x6144x4096", "prefill"): (4, 141.92), ("aten::mm", "512x4096x4096", "prefill"): (4, 94.56),
        (MACHETE, "1x28672x4096", "decode"): (32, 939.418), (MACHETE, "1x4096x14336", "decode"): (32, 722.912),
        (MACHETE, "1x6144x4096", "decode"): (32, 461.149), ("aten::mm", "1x4096x4096", "decode"): (32, 415.68),
        ("aten::mm", "1x128256x4096", "prefill"): (1, 247.423), ("aten::mm", "1x128256x4096", "decode"): (8, 1964.118),
    },
    "h200-graphs-off": {
        ("machete", "", "prefill"): (64, 11645.875), ("machete", "", "decode"): (512, 18141.234),
        ("aten::mm", "1x151936x5120", "prefill"): (1, 372.671), ("aten::mm", "1x151936x5120", "decode"): (8, 2953.045),
    },
    "h200-graphs-on": {
        ("machete", "", "prefill"): (16, 5300.107), ("machete", "", "decode"): (512, 18197.909),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_splitK_TNT", "", "prefill"): (16, 2689.365),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "", "prefill"): (16, 1109.755),
        ("nvjet_sm90_tst_168x128_64x5_1x2_h_bz_TNN", "", "prefill"): (16, 918.782),
        ("cublasLt::splitKreduce_kernel", "", "prefill"): (16, 186.207),
        ("aten::mm", "1x151936x5120", "prefill"): (1, 376.67), ("aten::mm", "1x151936x5120", "decode"): (8, 2957.652),
    },
}  # fmt: skip

TOTALS = {
    "cpu-off": 21400.468, "cpu-on": 18034.301, "h200-eager-off": 7590.966, "h200-eager-on": 7436.729,
    "h200-graphs-off": 38637.861, "h200-graphs-on": 38243.117,
}  # fmt: skip


def result_of(name: str, **settings: Any) -> dict[str, Any]:
    return roofline([DATA / f"{name}.json.gz"], **settings)


@pytest.mark.parametrize("name", LINEARS)
def test_every_linear(name: str) -> None:
    result = result_of(name)
    linears = [r for r in result["ops"] if r["kind"] in ("gemm", "w4a16")]
    assert {(r["op"], r["shape"], r["phase"]): (r["calls"], r["time_us"]) for r in linears} == LINEARS[name]
    for row in linears:
        if row["shape"]:
            m, n, k = map(int, row["shape"].split("x"))
            assert row["flops"] == row["calls"] * 2 * m * n * k
        else:
            assert row["flops"] is row["bytes"] is row["roof_pct"] is None


@pytest.mark.parametrize("name", TOTALS)
def test_all_time_is_accounted_for(name: str) -> None:
    result = result_of(name)
    assert result["device_time_us"] == TOTALS[name]
    assert sum(r["time_us"] for r in result["ops"]) == pytest.approx(TOTALS[name], abs=0.1)
    assert sum(r["time_us"] for r in result["kinds"]) == pytest.approx(TOTALS[name], abs=0.1)
    assert sum(r["share"] for r in result["ops"]) == pytest.approx(1.0, abs=1e-3)
    assert result["attributed"] >= 0.98
    assert sum(result["attribution"].values()) == pytest.approx(1.0, abs=1e-5)
    assert result["on"] == name.split("-")[0].replace("h200", "gpu")
    assert [(p["phase"], p["steps"]) for p in result["phases"]][:2] == [("prefill", 1), ("decode", 2 if "cpu" in name else 8)]


@pytest.mark.parametrize("name", ["h200-eager-off", "h200-eager-on"])
def test_int4_counts_as_int4(name: str) -> None:
    """Machete, 28672 x 4096, group 128, M = 1: half a byte a weight, 2 a scale."""
    row = next(r for r in result_of(name)["ops"] if r["shape"] == "1x28672x4096")
    each = 28672 * 4096 // 2 + 28672 * 32 * 2 + 2 * (4096 + 28672)
    assert row["bytes"] == 32 * each
    assert row["bound"] == "memory"
    assert row["roof_pct"] == pytest.approx(100 * each / 4.8e12 / (row["time_us"] / 32e6), abs=0.01)


def test_attention_of_eager_steps() -> None:
    """32 heads of 128, 8 of keys; 512 tokens, then one on 513 to 520."""
    rows = {r["phase"]: r for r in result_of("h200-eager-on", kind="attention")["ops"] if r["shape"]}
    assert rows["prefill"]["flops"] == 4 * 4 * 32 * 128 * 512 * 512
    assert rows["decode"]["flops"] == 4 * 4 * 32 * 128 * sum(range(513, 521))
    assert rows["decode"]["bytes"] == 4 * 2 * 128 * (8 * 2 * 32 + 2 * 8 * sum(range(513, 521)))


def test_the_proof_in_one_command() -> None:
    """Decode still runs the int4 kernel, and prefill what has a twin by a dense GEMM, on the CPU."""
    diff = roofline([DATA / "cpu-off.json.gz", DATA / "cpu-on.json.gz"])["diff"]
    changes = {(r["op"], r["shape"], r["phase"]): r["change"] for r in diff["ops"] if r["kind"] in ("gemm", "w4a16")}
    for n, k in ((1152, 384), (384, 1152), (384, 384), (128, 384)):
        assert changes[INT4, f"64x{n}x{k}", "prefill"] == "vanished"
        assert changes["aten::mm", f"64x{n}x{k}", "prefill"] == "appeared"
        assert changes[INT4, f"1x{n}x{k}", "decode"] in ("same", "faster", "slower")
        assert ("aten::mm", f"1x{n}x{k}", "decode") not in changes
    linear = next(r for r in diff["linears"] if r["shape"] == "64x1152x384")
    assert (linear["ops_before"], linear["ops_after"], linear["change"]) == ([INT4], ["aten::mm"], "faster")
    assert linear["speedup"] == pytest.approx(5512.382 / 3430.891, abs=1e-4)


def test_a_trace_against_itself_has_not_changed() -> None:
    diff = roofline([DATA / "h200-eager-on.json.gz"] * 2)["diff"]
    assert {r["change"] for rows in (diff["ops"], diff["kinds"], diff["linears"]) for r in rows} == {"same"}
