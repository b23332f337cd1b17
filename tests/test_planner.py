"""The offline planner: documented examples re-derived by hand, agreement with servers that ran, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_measured import measured
from twinweight import cache, gpus, plots, presets
from twinweight.errors import CheckpointError, ConfigError
from twinweight.measured import Measured
from twinweight.planner import Request, plan_model
from twinweight.report import plan_table
from twinweight.sharding import shard
from twinweight.workload import Workload

GIB = 1 << 30
ROOT = Path(__file__).parent.parent


def by_hand(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tp: int,
    gib: int,
    floor: int,
    tokens: int,
    sequences: int,
) -> dict[str, int]:
    """The arithmetic of docs/planning.md, from the model card alone. Heads have 128 dimensions, the head is not tied."""
    qkv = (heads + 2 * kv_heads) // tp * 128 * hidden
    o = hidden * heads * 128 // tp
    gate_up, down = 2 * intermediate // tp * hidden, hidden * intermediate // tp
    elements = layers * (qkv + o + gate_up + down)
    int4 = elements // 2 + elements // 128 * 2
    dense = (2 * vocabulary // tp * hidden + (2 * layers + 1) * hidden) * 2
    total, widest = gib * GIB, max(2 * intermediate // tp, hidden)
    kv = 2 * layers * kv_heads // tp * 128 * 2
    activations = max(tokens * (widest * 3 // 2 + 4 * hidden) * 2, sequences * vocabulary * 4 * 3)
    graphs = 51 * (16 << 20)  # 1, 2, 4, then every 8th to 256, then every 16th to 512
    scratch = min(256 << 20, 2 * max(qkv, gate_up // 1, down, o))
    transient = max(512 * (widest + hidden) * 2, 40 << 20)
    kept = round(total * 0.1)
    room = total - kept - int4 - dense - activations - graphs - scratch - transient - floor * kv
    return {
        "weights": int4 + dense, "twins": 2 * elements, "room": room,
        "off": (room + scratch + transient + floor * kv) // kv,
        "hard": (room + transient + floor * kv - 2 * elements) // kv,
    }  # fmt: skip


LLAMA_8B = {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocabulary": 128256}
LLAMA_70B = {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocabulary": 128256}


@pytest.mark.parametrize(
    ("model", "ask", "hand", "fits"),
    [
        (
            "llama-3.1-8b", Request("rtx4090", kv_floor=32768),
            by_hand(**LLAMA_8B, tp=1, gib=24, floor=32768, tokens=2048, sequences=256), False,
        ),
        (
            "llama-3.3-70b", Request("h200", max_model_len=32768),
            by_hand(**LLAMA_70B, tp=1, gib=141, floor=32768, tokens=8192, sequences=1024), False,
        ),
        (
            "llama-3.3-70b", Request("h200", tp=2, max_model_len=32768),
            by_hand(**LLAMA_70B, tp=2, gib=141, floor=32768, tokens=8192, sequences=1024), True,
        ),
    ],
    ids=["8b on 24 GiB", "70b on one H200", "70b on two"],
)  # fmt: skip
def test_the_documented_examples(model: str, ask: Request, hand: dict[str, int], fits: bool) -> None:
    found = plan_model(model, ask)
    off, soft, hard = (found["modes"][m] for m in ("off", "soft", "hard"))
    assert found["budget"]["weights"] == hand["weights"]
    assert found["budget"]["for twins"] == hand["room"]
    assert (off["twins"], off["twin_bytes"], off["fits"], off["kv_tokens"]) == (0, 0, True, hand["off"])
    assert hard["fits"] is fits is (hand["twins"] <= hand["room"])
    assert hard["twin_bytes"] == hand["twins"]
    assert soft["fits"]
    assert soft["twin_bytes"] <= hand["room"]
    assert soft["kv_tokens"] >= found["kv_floor_tokens"] == 32768
    if fits:
        assert soft["twins"] == hard["twins"] == hard["weights"]
        assert soft["kv_tokens"] == hard["kv_tokens"] == hand["hard"]
        assert found["verdicts"] == {}
    else:
        # What is left over is less than the smallest twin there is.
        smallest = min(2 * k.n * k.k for k in shard(presets.preset(model)).weights.values())
        assert hand["room"] - soft["twin_bytes"] < smallest
        assert hard["missing_bytes"] == hand["twins"] - hand["room"]
        for word in ("weights", "KV floor", "left for twins", "GiB short", "twice as many GPUs"):
            assert word in found["verdicts"]["soft"]
        assert found["verdicts"]["hard"].count("(up to") == 3
    # The documentation quotes these figures.
    text = (ROOT / "docs" / "planning.md").read_text()
    for number in (f"{hand['room'] / GIB:.3f}", f"{soft['kv_tokens']:,}", f"{off['kv_tokens']:,}", f"{soft['twins']} of"):
        assert number in text, number


@pytest.mark.parametrize(
    ("model", "tp", "every_weight_got_a_twin"), [("llama-3.1-8b", 1, True), ("llama-3.1-8b", 2, True), ("qwen3-32b", 1, False)]
)
def test_kv_tokens_agree_with_servers_that_ran(model: str, tp: int, every_weight_got_a_twin: bool) -> None:
    """vLLM 0.26 on H200s with its defaults of the time: 92 % of the memory, 16384 tokens a step, 1024 sequences."""
    records = json.loads((ROOT / "benchmarks" / "results" / "h200-vllm.json").read_text())["records"]
    # Servers whose copies served `stream` alone, and had none here: what is planned before renting knows of twins alone.
    machete = [r for r in records if r["inner_kernel"] == "MacheteLinearKernel" and not r.get("copies")]
    ran = {r["mode"]: r["kv_tokens"] for r in machete if (r["model"], r["tp"]) == (model, tp)}
    ask = Request("h200", tp=tp, utilization=0.92, max_model_len=16384, tokens=16384, sequences=1024)
    modes = plan_model(model, ask)["modes"]
    assert modes["off"]["kv_tokens"] == pytest.approx(ran["off"], rel=0.02)
    if every_weight_got_a_twin:
        assert modes["soft"]["kv_tokens"] == pytest.approx(ran["on"], rel=0.02)
    else:
        # Beside Machete twins of a large model gain too little for the KV cache that they would take: the server had none.
        assert ran["on"] == pytest.approx(ran["off"], rel=0.001)


def tiny(**options: Any) -> dict[str, Any]:
    return plan_model("llama-3.2-1b", Request(**{"gpu": "RTX 4090", "max_model_len": 8192} | options))


def test_everything_adds_up() -> None:
    found = tiny()
    lines = found["budget"]
    reserves = lines["activations"] + lines["graphs and libraries"] + lines["scratch of stream"]
    for mode, modes in found["modes"].items():
        used = lines["kept free"] + lines["weights"] + reserves + modes["twin_bytes"] + modes["kv_bytes"]
        assert used == lines["total"] + (lines["scratch of stream"] if mode == "off" else 0)
        assert modes["kv_tokens"] == modes["kv_bytes"] // found["kv_bytes_per_token"]
    assert sum(s["soft"] for s in found["shapes"]) == found["modes"]["soft"]["twins"]
    assert found["modes"]["hard"]["prefill_tok_s"] > found["modes"]["off"]["prefill_tok_s"]
    assert found["speed"]["source"] == "roofline"


def test_nothing_fits_where_the_floor_does_not() -> None:
    found = tiny(kv_floor=10**6)
    assert not any(m["fits"] for m in found["modes"].values())
    assert all(m["twins"] == 0 for m in found["modes"].values())
    assert found["verdicts"]["off"].startswith("the KV floor does not fit")
    assert found["modes"]["off"]["missing_bytes"] > 0


def test_what_is_short_is_said_where_weights_alone_are_too_much() -> None:
    found = plan_model("llama-3.3-70b", Request("RTX 4090", kv_floor=4096))
    lines, off, hard = found["budget"], found["modes"]["off"], found["modes"]["hard"]
    needed = sum(lines[key] for key in ("weights", "kept free", "activations", "graphs and libraries", "KV floor"))
    assert off["missing_bytes"] == needed - lines["total"]
    assert hard["missing_bytes"] == off["missing_bytes"] + lines["scratch of stream"]
    for mode, its in (("off", off), ("hard", hard)):
        assert f"{its['missing_bytes'] / 2**30:.3f} GiB short" in found["verdicts"][mode]
        assert "use mode soft" not in found["verdicts"][mode]
        usable = (lines["total"] - lines["kept free"]) / GIB
        weights = f"the weights do not fit: {lines['weights'] / GIB:.2f} of {usable:.2f} GiB\n"
        assert found["verdicts"][mode].startswith(weights)


@pytest.mark.parametrize("mode", ["off", "soft", "hard"])
def test_more_gpus_halve_twins_only_where_twins_are_short(mode: str) -> None:
    found = plan_model("llama-3.3-70b", Request("RTX 4090", kv_floor=4096))
    halved = (found["budget"]["weights"] + found["budget"]["KV floor"]) / 2 / GIB
    assert f"twice as many GPUs (--tp) (up to {halved:.2f} GiB)" in found["verdicts"][mode]


@pytest.mark.parametrize(
    ("options", "floor"),
    [
        ({"max_model_len": None}, 131072),
        ({"max_model_len": None, "kv_floor": 4096}, 4096),
        ({"max_model_len": 8192, "kv_floor": 4096}, 8192),
        ({"max_model_len": 8192, "kv_floor": 65536}, 65536),
    ],
)
def test_the_floor_is_at_least_one_sequence(options: dict[str, Any], floor: int) -> None:
    assert tiny(**options)["kv_floor_tokens"] == floor


def test_small_batches_need_no_twin() -> None:
    found = tiny(workload=Workload.prefill(4))
    assert found["modes"]["hard"]["twins"] == found["modes"]["soft"]["twins"] == 0
    assert found["modes"]["hard"]["fits"]


def test_stored_measurements_are_used_where_all_shapes_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "describe", lambda device: {"type": "cuda", "name": "NVIDIA GeForce RTX 4090", "arch": "8.9"})
    store, device = cache.Cache(tmp_path), None
    kinds = list(dict.fromkeys(shard(presets.preset("llama-3.2-1b")).weights.values()))
    times = measured(int4=[2e-6, 4e-6, 8e-6, 16e-6], twin_bfloat16=[4e-6, 4e-6, 4e-6, 4e-6])
    for i, kind in enumerate(kinds):
        assert tiny()["speed"]["source"] == "roofline"
        key: dict[str, object] = {"engine": "vllm", "n": kind.n, "k": kind.k, "group_size": 128, "act_order": False}
        store.write({**key, "zero_points": False, "inner": f"Kernel{i}"}, device, times)  # type: ignore[arg-type]
    found = tiny()
    assert found["speed"]["source"] == "measured"
    # At 8 rows int4 takes 16 us and the twin 4; both grow with the rows from there on.
    ratio = found["modes"]["hard"]["prefill_tok_s"] / found["modes"]["off"]["prefill_tok_s"]
    assert 3 < ratio <= 4.001
    assert found["refused"] == {}
    assert plan_model("llama-3.2-1b", Request("h200", max_model_len=8192))["speed"]["source"] == "roofline"


def on_a_4090(where: Path, monkeypatch: pytest.MonkeyPatch, times: Measured) -> None:
    """Let these be the times that every linear of llama-3.1-8b was measured with on an RTX 4090."""
    monkeypatch.setenv(cache.VARIABLE, str(where))
    monkeypatch.setattr(cache, "describe", lambda device: {"type": "cuda", "name": "NVIDIA GeForce RTX 4090", "arch": "8.9"})
    for kind in dict.fromkeys(shard(presets.preset("llama-3.1-8b")).weights.values()):
        shape = {"engine": "vllm", "n": kind.n, "k": kind.k, "group_size": 128, "act_order": False, "zero_points": False}
        cache.Cache(where).write({**shape, "inner": f"Kernel{kind.n}x{kind.k}"}, None, times)  # type: ignore[arg-type]


def test_a_plan_says_why_twins_are_not_worth_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_4090(tmp_path, monkeypatch, measured(int4=[2e-6, 2e-6, 2e-6, 4e-6], twin_bfloat16=[4e-6, 4e-6, 4e-6, 3.9e-6]))
    found = plan_model("llama-3.1-8b", Request("RTX 4090", max_model_len=8192))
    assert found["modes"]["soft"]["twins"] == 0
    assert found["modes"]["soft"]["kv_tokens"] > 0
    assert list(found["refused"]) == ["soft"]
    assert "of the KV cache" in str(plan_table(found).parts)
    assert "of the KV cache" not in str(plan_table(found, "hard").parts)


def test_a_plan_from_a_servers_times_has_the_copies_that_the_server_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1, 2, 4 and 8 rows: a copy takes two thirds of the time of vLLM's kernel, and a twin prefills hardly faster."""
    times = measured(
        int4=[3e-6, 3e-6, 3e-6, 12e-6], own=[2e-6, 2e-6, 2e-6, 8e-6], fused=[9e-6, 9e-6, 9e-6, 7e-6],
        stream=[9e-6, 9e-6, 9e-6, 9e-6], twin_bfloat16=[9e-6, 9e-6, 9e-6, 6.9e-6],
    )  # fmt: skip
    on_a_4090(tmp_path, monkeypatch, times)
    found = plan_model("llama-3.1-8b", Request("RTX 4090", max_model_len=8192))
    soft, off, hard = (found["modes"][mode] for mode in ("soft", "off", "hard"))
    assert (soft["twins"], soft["copies"], off["copies"], hard["twins"]) == (0, 128, 0, 128)
    assert soft["twin_bytes"] == sum(
        k.n * k.k // 2 + k.n * k.k // 128 * 2 for k in shard(presets.preset("llama-3.1-8b")).weights.values()
    )
    assert 1.5 < soft["prefill_tok_s"] / off["prefill_tok_s"] < 12 / 7
    assert "0 of 128, 128 int4 copies" in str(plan_table(found).parts)


def test_a_floor_says_how_much_cache_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins that halve prefill would take nearly all of a small card's cache; without a floor they take less."""
    on_a_4090(tmp_path, monkeypatch, measured(int4=[2e-6, 2e-6, 4e-6, 8e-6], twin_bfloat16=[4e-6, 4e-6, 4e-6, 4e-6]))
    guessed, given = (
        plan_model("llama-3.1-8b", Request("RTX 4090", max_model_len=8192, **f)) for f in ({}, {"kv_floor": 8192})
    )
    assert guessed["budget"] == given["budget"]
    few, many = guessed["modes"]["soft"], given["modes"]["soft"]
    assert 0 < few["twins"] < many["twins"]
    assert few["kv_tokens"] > 1.4 * many["kv_tokens"] >= 1.4 * 8192
    assert "a KV floor says" in guessed["refused"]["soft"]
    assert "soft" not in given["refused"]
    assert guessed["modes"]["hard"] == given["modes"]["hard"]


def test_a_config_without_what_its_class_has_by_default_is_read() -> None:
    """Gemma's own leave out heads, vocabulary, longest context and that embeddings are tied."""
    from transformers import Gemma2Config

    whole = Gemma2Config().to_dict()
    least = {key: whole[key] for key in ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")}
    found, full = shard(least), shard({**whole, "model_type": "gemma2"})
    assert found == full
    assert found.longest == 8192
    assert found.embedding_bytes == 0


def test_active_experts_are_counted_by_the_name_that_a_model_has_for_them() -> None:
    config = {
        "model_type": "glm4_moe", "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
        "first_k_dense_replace": 1, "n_routed_experts": 16, "num_experts_per_tok": 2,
    }  # fmt: skip
    found = shard(config)
    assert found.expert_weights >= 16 * 3 * 128 * 256
    assert found.active_experts == found.expert_weights // 8


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": 0}, {"hidden_size": "abc"}, {"text_config": "x"}, {"hidden_act": "no"}]
)
def test_a_damaged_config_is_named(wrong: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(presets.preset("llama-3.2-1b", 2) | wrong))
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json|transformers"):
        plan_model(str(tmp_path), Request("h100"))


def test_a_config_of_any_origin_is_read(tmp_path: Path) -> None:
    config = presets.preset("llama-3.2-1b", 2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False, "sym": True}))
    found = plan_model(str(tmp_path), Request("h100", max_model_len=4096))
    assert found["modes"]["soft"]["weights"] == 8
    assert found["assumptions"] == []
    alone = plan_model(str(tmp_path / "config.json"), Request("h100", max_model_len=4096))
    assert len(alone["assumptions"]) == 1


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("nosuch", {}, ConfigError, "no preset.*llama-3.1-8b"),
        ("llama-3.2-1b", {"gpu": "abacus"}, ConfigError, "unknown GPU 'abacus'"),
        ("llama-3.2-1b", {"tp": 3}, ConfigError, "--tp 3"),
        ("llama-3.2-1b", {"utilization": 1.5}, ConfigError, "utilization"),
        ("llama-3.2-1b", {"kv_floor": 0}, ConfigError, "KV floor is 0"),
        ("llama-3.2-1b", {"max_model_len": -5}, ConfigError, "max model length is -5"),
    ],
)
def test_bad_requests(model: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_model(model, Request(**{"gpu": "h200"} | options))


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"hidden_size": 3}'])
def test_files_that_are_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        plan_model(str(tmp_path / "config.json"), Request("h200"))


@pytest.mark.parametrize("name", ["h200", "rtx4090", "strix-halo", "mi300x"])
def test_every_named_gpu_can_be_planned_for(name: str) -> None:
    found = tiny(gpu=name)
    assert found["gpu"] == gpus.gpu(name).name
    assert found["modes"]["hard"]["prefill_tok_s"] > 0


def test_rows_are_padded_where_the_gpu_needs_it() -> None:
    """RDNA3: a row of 2048 bf16 values is a multiple of 2048 bytes and gets a cache line more."""
    plain, padded = (tiny(gpu=name)["modes"]["hard"]["twin_bytes"] for name in ("rtx4090", "gfx1100"))
    assert padded - plain == 128 * sum(k.n for k in shard(presets.preset("llama-3.2-1b")).weights.values())


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots.plan_plot(tiny(), tmp_path / "sub" / "plan.png")
    assert (tmp_path / "sub" / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        plots.plan_plot(tiny(), tmp_path / "plan.nosuchformat")
