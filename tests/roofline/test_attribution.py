"""Who launched what: made-up traces in the dialects of CUDA and ROCm, every figure of which is known."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.roofline.generate import BF16, FLASH, INT, MACHETE, NORM, NVJET, TENSILE, Recorder, linear
from twinweight.roofline.run import roofline

PREFILL, DECODE = "execute_context_1(512)_generation_0(0)", "execute_context_0(0)_generation_1(1)"


def rows(result: dict[str, Any]) -> dict[tuple[str, str, str, str], tuple[int, float]]:
    """(op, shape, kind, phase) -> (calls, time)."""
    return {(r["op"], r["shape"], r["kind"], r["phase"]): (r["calls"], r["time_us"]) for r in result["ops"]}


@pytest.mark.parametrize("rocm", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_exact_table(tmp_path: Path, rocm: bool, suffix: str) -> None:
    int4 = "skinny" if rocm else "machete"
    name = "_rocm_C::wvSplitK_int4_g" if rocm else "_C::machete_mm"
    r = Recorder(rocm=rocm)
    label = r.label(PREFILL)
    linear(r, 512, 6144, 4096, 100.0, path="dense")
    linear(r, 512, 6144, 4096, 102.0, path="dense")
    r.end(label)
    for _ in range(3):
        label = r.label(DECODE)
        linear(r, 1, 6144, 4096, 10.0, path=int4)
        op = r.op("_C::silu_and_mul", [[1, 8], [1, 16]], [BF16, BF16])
        r.kernel("void vllm::act_and_mul_kernel<c10::BFloat16>(int)", 2.0)
        r.end(op, label)
    result = roofline([r.write(tmp_path / f"t{suffix}")])
    assert rows(result) == {
        ("aten::mm", "512x6144x4096", "gemm", "prefill"): (2, 202.0),
        (name, "1x6144x4096", "w4a16", "decode"): (3, 30.0),
        ("_C::silu_and_mul", "", "elementwise", "decode"): (3, 6.0),
    }
    assert result["gpu"]["name"] == ("gfx1151" if rocm else "H200")
    assert result["attributed"] == 1.0
    assert result["attribution"] == {"launch": 1.0, "graph": 0.0, "name": 0.0, "none": 0.0}
    assert result["device_time_us"] == 238.0
    dense = result["ops"][0]
    flops, moved = 2 * 2 * 512 * 6144 * 4096, 2 * 2 * (512 * 4096 + 6144 * 4096 + 512 * 6144)
    peak, bandwidth = (59.4e12, 256e9) if rocm else (989.4e12, 4.8e12)
    assert (dense["flops"], dense["bytes"], dense["path"], dense["bound"]) == (flops, moved, "twin", "compute")
    assert dense["share"] == pytest.approx(202 / 238, abs=1e-6)
    assert dense["tflops"] == pytest.approx(flops / 202e-6 / 1e12, rel=1e-4)
    assert dense["tbps"] == pytest.approx(moved / 202e-6 / 1e12, rel=1e-4)
    assert dense["roof_pct"] == pytest.approx(100 * flops / peak / 202e-6, abs=0.01)
    decode = result["ops"][1]
    packed = 6144 * 4096 // 2 + 6144 * 32 * 2 + 2 * (4096 + 6144)
    assert decode["bytes"] == 3 * packed
    assert decode["bound"] == "memory"
    assert decode["roof_pct"] == pytest.approx(100 * 3 * packed / bandwidth / 30e-6, abs=0.01)


@pytest.mark.parametrize("shapes", [True, False])
def test_labels_stand_in_for_shapes_and_ops(tmp_path: Path, shapes: bool) -> None:
    """A Triton kernel is launched under our label with no op inside; without record_shapes the label is all there is."""
    r = Recorder(shapes=shapes)
    outer = r.op("twinweight::linear", [[1, 4096], [6144, 512], [6144, 32], *[[]] * 7],
                 [BF16, INT, BF16, "", "", "", "", "ScalarList", "Scalar", "Scalar"], [""] * 9 + ["6144"])  # fmt: skip
    label = r.label("twinweight::int4 1x6144x4096")
    r.kernel("_dot_kernel", 10.0, launch="cuLaunchKernelEx")
    r.end(label, outer)
    linear(r, 512, 6144, 4096, 100.0, path="dense")
    op = r.label("wvsplitk_int4 1x12288x2048")
    r.kernel("kernel", 7.0)
    r.end(op)
    result = roofline([r.write(tmp_path / "t.json")])
    assert {k[:3]: v for k, v in rows(result).items()} == {
        ("twinweight::int4", "1x6144x4096", "w4a16"): (1, 10.0),
        ("aten::mm", "512x6144x4096", "gemm"): (1, 100.0),
        ("wvsplitk_int4", "1x12288x2048", "w4a16"): (1, 7.0),
    }
    assert {r["op"]: r["path"] for r in result["ops"]} == {
        "twinweight::int4": "int4", "aten::mm": "twin", "wvsplitk_int4": "wvsplitk_int4"
    }  # fmt: skip
    int4 = next(r for r in result["ops"] if r["op"] == "twinweight::int4")
    assert int4["bytes"] == 6144 * 4096 // 2 + 6144 * 32 * 2 + 2 * (4096 + 6144)


def test_without_its_launch_a_kernel_has_its_op_by_external_id(tmp_path: Path) -> None:
    r = Recorder()
    op = r.op("aten::mm", [[2, 8], [8, 4]], [BF16, BF16])
    r.kernel(NVJET, 5.0, launch=None)
    r.events[-1]["args"]["External id"] = r.external
    r.end(op)
    assert rows(roofline([r.write(tmp_path / "t.json")])) == {("aten::mm", "2x4x8", "gemm", "other"): (1, 5.0)}


def test_what_nobody_launched_is_known_by_name_or_said_to_be_unknown(tmp_path: Path) -> None:
    r = Recorder()
    r.kernel(NVJET, 60.0)
    r.kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(int)", 20.0, launch=None)  # ROCm: correlation 0
    r.kernel("void somebody::kernel<int>(float*)", 15.0)
    r.kernel("void somebody::kernel<int>(float*)", 5.0)
    result = roofline([r.write(tmp_path / "t.json")])
    assert result["attributed"] == 0.8
    assert result["attribution"] == {"launch": 0.0, "graph": 0.0, "name": 0.8, "none": 0.2}
    assert rows(result) == {
        (NVJET, "", "gemm", "other"): (1, 60.0),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "", "communication", "other"): (1, 20.0),
        ("somebody::kernel", "", "other", "other"): (2, 20.0),
    }
    assert all(r["flops"] is None and r["roof_pct"] is None for r in result["ops"])


def test_an_op_owns_what_happens_inside(tmp_path: Path) -> None:
    """Attention from the outermost; a linear from the innermost, with the helpers of its GEMM."""
    r = Recorder()
    outer = r.op("vllm::unified_attention_with_output", [[1, 32, 128]], [BF16])
    inner = r.op("_vllm_fa3_C::fwd", [[1, 32, 128]], [BF16])
    r.kernel(FLASH, 8.0)
    r.kernel("void cutlass::device_kernel<flash::FlashAttnFwdCombine<> >(int)", 2.0)
    r.end(inner)
    copy = r.op("aten::copy_", [[4], [4], []], [BF16, BF16, "Scalar"])
    r.kernel("copy", 1.0)
    r.end(copy, outer)
    first = r.op("aten::linear", [[2, 8], [4, 8], []], [BF16, BF16, ""])
    second = r.op("aten::addmm", [[4], [2, 8], [8, 4]], [BF16] * 3)
    r.kernel(NVJET, 5.0)
    r.kernel("void cublasLt::splitKreduce_kernel<32>(int)", 1.0)
    r.end(second, first)
    assert {k[:3]: v for k, v in rows(roofline([r.write(tmp_path / "t.json")])).items()} == {
        ("vllm::unified_attention_with_output", "", "attention"): (1, 11.0),
        ("aten::addmm", "2x4x8", "gemm"): (1, 6.0),
    }


SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def model_step(r: Recorder, m: int, times: list[float], *, graph: bool, path: str = "machete") -> None:
    """A label, four linears and a norm each; in a graph, their kernels in one replay."""
    label = r.label(PREFILL if m > 1 else DECODE)
    if graph:
        r.graph(*itertools.chain.from_iterable(((MACHETE if path == "machete" else NVJET, t), (NORM, 1.0)) for t in times))
    else:
        for (n, k), time in zip(SHAPES, times, strict=True):
            linear(r, m, n, k, time, path=path)
            r.kernel(NORM, 1.0)
    r.end(label)


def test_replayed_kernels_by_name(tmp_path: Path) -> None:
    r = Recorder()
    for _ in range(2):
        model_step(r, 1, [1.0, 2.0, 3.0, 4.0], graph=True)
    result = roofline([r.write(tmp_path / "t.json")])
    assert rows(result) == {
        ("machete", "", "w4a16", "decode"): (8, 20.0),
        ("triton_red_fused_fused_add_rms_norm", "", "norm", "decode"): (8, 8.0),
    }
    assert result["attribution"]["name"] == 1.0


@pytest.mark.parametrize("rocm", [False, True])
@pytest.mark.parametrize("where", ["same", "beside", "given"])
def test_replayed_kernels_by_reference(tmp_path: Path, where: str, rocm: bool) -> None:
    """The i-th machete of a step is that of the i-th linear; prefill's shapes are not taken for decode's."""
    graphs = Recorder(rocm=rocm)
    eager = graphs if where == "same" else Recorder(rocm=rocm)
    model_step(eager, 512, [50.0, 60.0, 70.0, 80.0], graph=False)
    model_step(eager, 1, [11.0, 12.0, 13.0, 14.0], graph=False)
    model_step(graphs, 1, [1.0, 2.0, 3.0, 4.0], graph=True)
    trace = graphs.write(tmp_path / "on.json")
    reference = None
    if where == "beside":
        eager.write(tmp_path / "on.eager.json")
    elif where == "given":
        reference = eager.write(tmp_path / "any.json")
    result = roofline([trace], reference=reference, phase="decode")
    own = [11.0, 12.0, 13.0, 14.0] if where == "same" else [0.0] * 4
    calls = 2 if where == "same" else 1
    found = {(r["shape"], r["kind"]): (r["op"], r["calls"], r["time_us"]) for r in result["ops"] if r["kind"] == "w4a16"}
    assert found == {(f"1x{n}x{k}", "w4a16"): ("_C::machete_mm", calls, i + 1.0 + own[i]) for i, (n, k) in enumerate(SHAPES)}
    first = next(r for r in result["ops"] if r["shape"] == "1x6144x4096")
    assert first["flops"] == calls * 2 * 6144 * 4096
    assert first["roof_pct"] is not None
    # One list of directories lists no reference as a trace of its own.
    assert len(roofline([tmp_path])["trace"].split(",")) == (2 if where == "given" else 1)


def test_a_reference_of_another_batch_is_not_used(tmp_path: Path) -> None:
    eager, graphs = Recorder(), Recorder()
    for r, m in ((eager, 8), (graphs, 1)):
        label = r.label(DECODE)
        linear(r, m, 1000, 4096, 5.0, path="dense")  # the head, outside of the graph, tells the rows
        if r is graphs:
            r.graph((MACHETE, 3.0))
        else:
            linear(r, m, 6144, 4096, 9.0, path="machete")
        r.end(label)
    result = roofline([graphs.write(tmp_path / "g.json")], reference=eager.write(tmp_path / "e.json"))
    assert ("machete", "", "w4a16", "decode") in rows(result)


def test_steps_without_labels(tmp_path: Path) -> None:
    """By embeddings: ids [B, S] say which step is decode; packed ids leave it to the rows of the linears."""
    for packed in (False, True):
        r = Recorder()
        for tokens in (64, 1, 1):
            ids = [2 * tokens] if packed else [2, tokens]
            op = r.op("aten::embedding", [[1000, 8], ids], [BF16, "long int"])
            r.kernel("embedding", 1.0)
            r.end(op)
            linear(r, 2 * tokens, 16, 8, 4.0, path="machete" if tokens == 1 else "dense")
            linear(r, 2, 1000, 8, 2.0, path="dense")
        result = roofline([r.write(tmp_path / "t.json")])
        assert [(p["phase"], p["steps"], p["rows"], p["time_us"]) for p in result["phases"]] == [
            ("prefill", 1, [128], 7.0), ("decode", 2, [2], 14.0)
        ]  # fmt: skip
        assert rows(result)["aten::mm", "2x1000x8", "gemm", "decode"] == (2, 4.0)
        assert rows(result)["aten::mm", "128x16x8", "gemm", "prefill"] == (1, 4.0)


def test_detailed_labels_tell_the_work_of_attention(tmp_path: Path) -> None:
    r = Recorder()
    label = r.label("execute_2_context_0(sq0sk0sqsq0sqsk0)_generation_2(sq2sk300sqsq2sqsk300)")
    op = r.op("vllm::unified_attention_with_output", [[2, 32, 128], [2, 8, 128], [2, 8, 128]], [BF16] * 3)
    r.kernel(FLASH, 10.0)
    r.end(op, label)
    (row,) = roofline([r.write(tmp_path / "t.json")])["ops"]
    assert (row["flops"], row["bytes"], row["phase"]) == (4 * 32 * 128 * 300, 2 * 128 * (2 * 2 * 32 + 2 * 300 * 8), "decode")


def test_ranks_in_a_directory_are_summed(tmp_path: Path) -> None:
    for rank in range(2):
        r = Recorder()
        linear(r, 1, 6144, 4096, 10.0 + rank, path="machete")
        r.write(tmp_path / f"rank{rank}.json.gz")
    assert rows(roofline([tmp_path]))["_C::machete_mm", "1x6144x4096", "w4a16", "other"] == (2, 21.0)


def test_a_directory_of_profile_is_two_traces(tmp_path: Path) -> None:
    for name, us in (("on", 5.0), ("off", 10.0), ("off.eager", 30.0)):
        r = Recorder()
        linear(r, 1, 6144, 4096, us, path="machete")
        r.write(tmp_path / f"{name}.json.gz")
    found = roofline([tmp_path])
    assert [sum(op["time_us"] for op in found[arm]["ops"]) for arm in ("before", "after")] == [10.0, 5.0]


def test_two_streams_and_threads_do_not_mix(tmp_path: Path) -> None:
    """The same times on another thread, with an op around the launch that must not be taken for its parent."""
    r = Recorder()
    op = r.op("aten::mm", [[2, 8], [8, 4]], [BF16, BF16])
    r.kernel(TENSILE, 5.0)
    r.end(op)
    other = dict(op, name="aten::softmax", tid=8, ts=op["ts"] - 1, dur=op["dur"] + 5, args={"External id": 99})
    r.events.append(other)
    assert rows(roofline([r.write(tmp_path / "t.json")])) == {("aten::mm", "2x4x8", "gemm", "other"): (1, 5.0)}
