"""FLOPs and bytes: figures worked out by hand, and a whole model against torch.utils.flop_counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from twinweight.roofline.attributing import attribute
from twinweight.roofline.counting import from_label, work_of
from twinweight.roofline.ops import kind_of
from twinweight.roofline.reading import read
from twinweight.roofline.records import Signature

BF, F, INT, L, U = "c10::BFloat16", "float", "int", "long int", "unsigned char"


def work(name: str, dims: list[Any], types: list[str], values: list[str] | None = None, lists: list[Any] | None = None) -> Any:
    inputs = Signature(
        tuple(tuple(d) for d in dims), tuple(types), tuple(values or [""] * len(dims)), tuple(tuple(d) for d in lists or ())
    )
    return work_of(name, kind_of(name), inputs)


# op, dims, types, values, (flops, bytes, dtype, shape)
CASES: list[Any] = [
    ("aten::mm", [[3, 5], [5, 7]], [BF, BF], None, (210, 2 * (15 + 35 + 21), "bfloat16", "3x7x5")),
    ("aten::mm", [[3, 5], [5, 7]], [F, F], None, (210, 4 * (15 + 35 + 21), "float32", "3x7x5")),
    ("aten::mm", [[0, 5], [5, 7]], [BF, BF], None, (0, 70, "bfloat16", "0x7x5")),
    ("aten::addmm", [[7], [3, 5], [5, 7], [], []], [BF] * 3 + ["Scalar"] * 2, None, (210, 14 + 142, "bfloat16", "3x7x5")),
    ("aten::bmm", [[2, 3, 5], [2, 5, 7]], [BF, BF], None, (420, 284, "bfloat16", "2x3x7x5")),
    ("aten::mv", [[3, 5], [5]], [F, F], None, (30, 4 * (15 + 5 + 3), "float32", "3x1x5")),
    ("aten::linear", [[2, 3, 5], [7, 5], []], [BF, BF, ""], None, (420, 2 * (30 + 35 + 42), "bfloat16", "6x7x5")),
    ("aten::matmul", [[2, 3, 5], [5, 7]], [BF, BF], None, (420, 2 * (30 + 35 + 42), "bfloat16", "6x7x5")),
    ("aten::matmul", [[2, 4, 3, 5], [2, 4, 5, 7]], [BF, BF], None, (1680, 2 * (120 + 280 + 168), "bfloat16", "8x3x7x5")),
    ("aten::_int_mm", [[3, 5], [5, 7]], ["signed char"] * 2, None, (210, 50 + 84, "int8", "3x7x5")),
    ("aten::_scaled_mm", [[3, 16], [16, 7], [], []], ["c10::Float8_e4m3fn"] * 2 + [F] * 2, None,
     (672, 48 + 112 + 4 + 4 + 42, "fp8", "3x7x16")),
    ("_C::cutlass_scaled_mm", [[3, 7], [3, 16], [16, 7], [1], [1]], [BF, *["c10::Float8_e4m3fn"] * 2, F, F], None,
     (672, 42 + 48 + 112 + 8 + 42, "fp8", "3x7x16")),
    ("aten::convolution", [[1, 3, 8, 8], [16, 3, 2, 2], [], [], [], []], [BF, BF, "", *["ScalarList"] * 3],
     ["", "", "", "[2, 2]", "[0, 0]", "[1, 1]"], (2 * 16 * 16 * 12, 2 * (192 + 192 + 256), "bfloat16", "16x16x12")),
    # Machete: int32 holds 8 nibbles along K; scales [K / 128, N].
    ("_C::machete_mm", [[1, 4096], [512, 28672], [], [], [32, 28672]], [BF, INT, "Scalar", "", BF], None,
     (234881024, 8192 + 58720256 + 1835008 + 57344, "bfloat16", "1x28672x4096")),
    # Marlin: [K / 16, 2 N] int32, a workspace of ints beside it.
    ("_C::marlin_gemm", [[5, 4096], [], [256, 12288], [32, 6144], [], [160]], [BF, "", INT, BF, "", INT], None,
     (2 * 5 * 6144 * 4096, 40960 + 12582912 + 393216 + 640 + 61440, "bfloat16", "5x6144x4096")),
    # ROCm's skinny kernel has the weight first.
    ("_rocm_C::wvSplitK_int4_g", [[12288, 256], [1, 2048], [12288, 16]], [INT, BF, BF], None,
     (2 * 12288 * 2048, 12582912 + 4096 + 393216 + 24576, "bfloat16", "1x12288x2048")),
    ("aten::_weight_int4pack_mm_for_cpu", [[128, 384], [384, 192], [], [3, 384, 2]], [BF, U, "Scalar", BF], None,
     (2 * 128 * 384 * 384, 98304 + 73728 + 4608 + 98304, "bfloat16", "128x384x384")),
    ("aten::_weight_int4pack_mm", [[2, 1024], [64, 8, 32, 4], [], [8, 512, 2]], [BF, INT, "Scalar", BF], None,
     (2 * 2 * 512 * 1024, 4096 + 262144 + 16384 + 2048, "bfloat16", "2x512x1024")),
    # Rows are padded to 64, N is the last argument; the twin is not read.
    ("twinweight::linear", [[1, 2, 384], [128, 192], [3, 128, 2], [], [], [], [100, 384], [], [], []],
     [BF, U, BF, "", "", "", F, "ScalarList", "Scalar", "Scalar"], ["", "", "", "", "", "", "", "[0, 0]", "128", "100"],
     (2 * 2 * 100 * 384, 1536 + 24576 + 1536 + 400, "bfloat16", "2x100x384")),
    ("aten::scaled_dot_product_attention", [[1, 6, 128, 64], [1, 2, 128, 64], [1, 2, 128, 64], [], [], []],
     [BF, BF, BF, "", "Scalar", "Scalar"], ["", "", "", "", "0.", "False"],
     (4 * 6 * 128 * 128 * 64, 2 * 64 * 128 * (6 + 6 + 2 + 2), "bfloat16", "1x6x128x64")),
    ("aten::_grouped_mm", [[8, 64], [4, 64, 32]], [BF, BF], None,
     (2 * 8 * 32 * 64, 4 * 64 * 32 * 2 + 8 * 96 * 2, "bfloat16", "8x32x64")),
    ("vllm::inplace_fused_experts", [[2, 64], [8, 96, 64], [8, 64, 48], [2, 3]], [BF, BF, BF, F], None,
     (2 * 2 * 3 * (96 * 64 + 64 * 48), 6 * (96 * 64 + 64 * 48) * 2 + 512, "bfloat16", "2x96x64 top 3 of 8")),
    ("aten::embedding", [[4096, 384], [1, 128]], [BF, L], None, (0, 2 * 128 * 768 + 1024, "bfloat16", "")),
    ("aten::copy_", [[4, 8], [4, 8], []], [F, BF, "Scalar"], None, (0, 128 + 64, "float32", "")),
    ("aten::add", [[4, 8], [8], []], [BF, BF, "Scalar"], None, (0, 64 + 16 + 64, "bfloat16", "")),
    ("aten::mul_", [[4, 8], [8]], [BF, BF], None, (0, 64 + 16 + 64, "bfloat16", "")),
    ("aten::mean", [[4, 8], [], [], []], [F, "ScalarList", "Scalar", ""], None, (0, 128, "float32", "")),
    ("_C::silu_and_mul", [[512, 14336], [512, 28672]], [BF, BF], None, (0, 2 * 512 * 43008, "bfloat16", "")),
    ("_C::rms_norm", [[2, 8], [2, 8], [8], []], [BF, BF, BF, "Scalar"], None, (0, 32 + 32 + 16, "bfloat16", "")),
    ("_C::fused_add_rms_norm", [[2, 8], [2, 8], [8], []], [BF, BF, BF, "Scalar"], None, (0, 4 * 32 + 16, "bfloat16", "")),
    ("_C::rotary_embedding", [[2], [2, 64], [2, 32], [], [999, 16]], [L, BF, BF, "Scalar", BF], None,
     (0, 16 + 2 * (256 + 128) + 2 * 32, "", "")),
    ("_C_cache_ops::reshape_and_cache_flash", [[2, 8, 16], [2, 8, 16], [99, 16, 8, 16], [99, 16, 8, 16], [2]],
     [BF, BF, BF, BF, L], None, (0, 2 * 2 * 512 + 16, "bfloat16", "")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dims", "types", "values", "expected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_by_hand(name: str, dims: list[Any], types: list[str], values: list[str] | None, expected: tuple[Any, ...]) -> None:
    found = work(name, dims, types, values)
    assert (found.flops, found.bytes, found.dtype, found.shape) == expected
    assert found.needed == found.flops


@pytest.mark.parametrize(
    ("dims", "types"), [([[5, 4096], [256, 12288]], ["", INT]), ([[5, 0], [256, 12288]], [BF, INT]), ([[], []], [BF, INT])]
)
def test_a_call_whose_inputs_say_too_little_is_not_counted(dims: list[list[int]], types: list[str]) -> None:
    assert work("_C::marlin_gemm", dims, types) is None


def test_lists_of_tensors_are_read_and_written() -> None:
    assert work("aten::cat", [[], []], ["TensorList", "Scalar"], None, [[2, 8], [3, 8]]).bytes == 2 * 2 * 40


def test_causal_attention_needs_half() -> None:
    dims = [[2, 4, 100, 32], [2, 4, 100, 32], [2, 4, 100, 32], [], [], []]
    found = work("aten::scaled_dot_product_attention", dims, [BF] * 3 + [""] * 3, ["", "", "", "", "0.", "True"])
    assert found.flops == 4 * 2 * 4 * 100 * 100 * 32
    assert found.needed == 4 * 2 * 4 * 32 * 100 * 101 // 2


FA3_VALUES = [""] * 12 + ["{q}", "{k}"] + [""] * 10 + ["True"]


@pytest.mark.parametrize(("q", "k", "needed"), [(512, 512, 512 * 513 // 2), (1, 520, 520), (16, 100, 16 * 100 - 16 * 15 // 2)])
def test_packed_attention_of_one_sequence(q: int, k: int, needed: int) -> None:
    dims = [[q, 32, 128], [999, 16, 8, 128], [999, 16, 8, 128], *[[]] * 4, [2], *[[]] * 17]
    found = work("_vllm_fa3_C::fwd", dims, [BF] * 3 + [""] * 22, [v.format(q=q, k=k) for v in FA3_VALUES])
    assert found.flops == 4 * 32 * 128 * q * k
    assert found.needed == 4 * 32 * 128 * needed
    assert found.bytes == 2 * 128 * (2 * q * 32 + 2 * k * 8)


def test_packed_attention_of_many_sequences_is_unknown() -> None:
    dims = [[8, 32, 128], [999, 16, 8, 128], [999, 16, 8, 128], *[[]] * 4, [9], *[[]] * 17]
    found = work("_vllm_fa3_C::fwd", dims, [BF] * 3 + [""] * 22, [v.format(q=1, k=500) for v in FA3_VALUES])
    assert (found.flops, found.bytes, found.rows) == (None, None, 8)


@pytest.mark.parametrize(
    ("name", "dims", "types"),
    [
        ("aten::mm", [], []),
        ("aten::mm", [[3, 5]], [BF]),
        ("_C::machete_mm", [[1, 4096]], [BF]),
        ("twinweight::vllm_linear", [[1, 8], [1], [], []], [BF, L, "", "Scalar"]),
        ("my::op", [[3, 5]], [BF]),
        ("aten::scaled_dot_product_attention", [[1, 2, 3, 4]], [BF]),
        ("vllm::moe_forward", [[3, 5], [3, 8]], [BF, BF]),
    ],
)
def test_unknown_is_none(name: str, dims: list[Any], types: list[str]) -> None:
    assert work(name, dims, types) is None


def test_a_label_alone_tells() -> None:
    int4, dense = from_label(1, 4096, 4096, int4=True), from_label(1, 4096, 4096, int4=False)
    assert int4.flops == dense.flops == 2 * 4096 * 4096
    assert int4.bytes == 4096 * 4096 // 2 + 4096 * 32 * 2 + 2 * 4096 * 2
    assert dense.bytes == 4096 * 4096 * 2 + 2 * 4096 * 2


def _attention_on_the_cpu(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """What torch counts for attention, for the one op that it has not registered."""
    return int(sdpa_flop_count(q, k, v))


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_the_cpu}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_against_the_flop_counter(tmp_path: Path, attention: str) -> None:
    """A dense Llama: every product of a prefill and of a decode step, FLOPs by torch, bytes by the tensors themselves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(2 * 33).view(2, 33)
    total = {}
    with torch.inference_mode():
        for run in ("count", "profile"):
            context: Any = (
                FlopCounterMode(display=False, custom_mapping=COUNTED)
                if run == "count"
                else torch.profiler.profile(record_shapes=True)
            )
            with context:
                cache = model(ids, use_cache=True).past_key_values
                model(ids[:, :1], past_key_values=cache)
            total[run] = context
    trace = tmp_path / "trace.json"
    total["profile"].export_chrome_trace(str(trace))
    calls = attribute(read(trace)).calls
    assert sum(c.work.flops or 0 for c in calls if c.work) == pytest.approx(total["count"].get_total_flops(), rel=0.01)
    products = [c.work for c in calls if c.kind == "gemm" and c.work and c.work.shape.count("x") == 2]
    weights = sum(p.numel() * 4 for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n)
    activations = sum(4 * m * (n + k) for m, n, k in (map(int, w.shape.split("x")) for w in products))
    assert sum(w.bytes or 0 for w in products) == pytest.approx(2 * weights + activations, rel=0.01)
