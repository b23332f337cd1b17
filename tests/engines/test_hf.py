"""The embedded engine, on two-layer models of every format: right logits, twins under a budget, derived data, clear errors."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import twinweight
from tests.formats import writers
from tests.helpers import assert_close
from twinweight import memory, modes, paths, synth, twin, twins
from twinweight.crossover import Crossovers, Measured, Shape
from twinweight.engines import hf
from twinweight.errors import BudgetError, CheckpointError, ConfigError, UnsupportedError
from twinweight.kernels import cpu, int8
from twinweight.linear import Int4Linear
from twinweight.timing import Timing
from twinweight.twins import int4_linears

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 352,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 199,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip


class Fixed(Crossovers):
    """Crossovers without a clock: int4 below 8 rows, the twin (of one kind) from there on."""

    def __init__(self, dtype: str | torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.asked: list[bool] = []

    def get(self, shape: Shape, *, with_twins: bool = True, lossy: Sequence[str] = ()) -> Measured:
        self.asked.append(with_twins)
        quick, slow, slower = (Timing(t, t, t) for t in (1.0, 2.0, 3.0))
        kinds = ("bfloat16", "float16", "float32", *lossy)
        times = {"int4": (quick, slow)} | {f"twin:{kind}": (slow, slower) for kind in kinds}
        times[twins.twin_choice(self.dtype)] = (slow, quick)
        return Measured((1, 8), times, shape.n)


CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not int8.available(), reason="needs a CPU with VNNI or AMX")
KINDS = ["float32", pytest.param("int8", marks=needs_int8)]
REQUEST = {"float32": None, "int8": "int8"}


@dataclass(frozen=True)
class Case:
    format: str
    symmetric: bool = True
    group_size: int | None = 32
    act_order: bool = False
    dtype: str = "bfloat16"


CASES = [
    Case("compressed-tensors"),
    Case("compressed-tensors", symmetric=False),
    Case("compressed-tensors", group_size=None, dtype="float16"),
    Case("compressed-tensors", act_order=True),
    Case("gptq"),
    Case("gptq", symmetric=False, act_order=True, dtype="float16"),
    Case("awq", symmetric=False),
    Case("awq", symmetric=False, dtype="float16"),
]


def write(out: Path, case: Case) -> dict[str, torch.Tensor]:
    """A two-layer Llama in one format; returns the dense float32 state dict it stands for."""
    dtype = getattr(torch, case.dtype)
    skeleton = synth.skeleton(TINY)
    modules, dense, reference = {}, {}, {}
    torch.manual_seed(0)
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for i, (name, linear) in enumerate(linears.items()):
        quant = writers.random_case(
            linear.out_features, linear.in_features, case.group_size, dtype=dtype, symmetric=case.symmetric,
            act_order=case.act_order, seed=i,
        )  # fmt: skip
        modules[name] = quant
        reference[f"{name}.weight"] = quant.dense().float()
    for name, parameter in skeleton.named_parameters():
        if name.rpartition(".")[0] not in linears:
            data = torch.ones(parameter.shape) if "norm" in name else torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
            dense[name] = data.to(dtype)
            reference[name] = dense[name].float()
    writer = {
        "compressed-tensors": writers.write_compressed_tensors, "gptq": writers.write_gptq, "awq": writers.write_awq
    }[case.format]  # fmt: skip
    writer(out, TINY | {"dtype": case.dtype}, modules, dense)
    return reference


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    write(out, CASES[0])
    return out


def load(path: Path, **options: object) -> transformers.PreTrainedModel:
    return twinweight.load(path, **{"device": "cpu", "crossovers": Fixed(), "progress": False} | options)  # type: ignore[arg-type]


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_close_to_a_dense_float32_model(case: Case, tmp_path: Path) -> None:
    reference = write(tmp_path, case)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"dtype": "float32"}))
    dense.load_state_dict(reference, strict=True)
    model = load(tmp_path, dtype=getattr(torch, case.dtype))
    assert len(int4_linears(model)) == 14
    assert all(m.twin is not None for m in int4_linears(model).values())
    ids = ids_of(1, 40)
    with torch.inference_mode():
        expected = dense.eval().to(torch.float32)(input_ids=ids).logits
        for use in (True, False):
            with twins.twins_in_use(model, use):
                assert_close(model(input_ids=ids).logits, expected, max_err=3e-2, rms_err=3e-2)
                one = model(input_ids=ids[:, :1]).logits
                assert_close(one, dense(input_ids=ids[:, :1]).logits, max_err=3e-2, rms_err=3e-2)


def changed(checkpoint: Path, out: Path, more: dict[str, torch.Tensor], config: dict[str, object] | None = None) -> Path:
    """A copy of a checkpoint with other tensors, and fields of its config.json, besides or in place of those it has."""
    shutil.copytree(checkpoint, out)
    (file,) = out.glob("*.safetensors")
    save_file({**load_file(file), **more}, file)
    fields = {**json.loads((out / "config.json").read_text()), **(config or {})}
    (out / "config.json").write_text(json.dumps(fields))
    return out


@pytest.mark.parametrize("same", [False, True])
def test_a_stored_head_is_tied_only_where_it_is_the_embedding(checkpoint: Path, tmp_path: Path, same: bool) -> None:
    embedding = load(checkpoint, mode="off").get_input_embeddings().weight
    head = embedding.clone() if same else torch.randn(embedding.shape).bfloat16()
    model = load(changed(checkpoint, tmp_path / "m", {"lm_head.weight": head}, {"tie_word_embeddings": True}), mode="off")
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert (model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is same


def test_a_dense_tensor_of_codes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """FP8 weights beside int4 ones have scales that nobody would apply."""
    codes = torch.zeros(199, 128).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight: expected float16.*, found torch\.float8_e4m3fn"):
        load(changed(checkpoint, tmp_path / "m", {"lm_head.weight": codes}))


def test_scales_of_activations_are_refused(tmp_path: Path) -> None:
    """AutoAWQ stores them for some architectures, whose activations transformers then wraps."""
    write(tmp_path / "awq", Case("awq", symmetric=False))
    path = changed(tmp_path / "awq", tmp_path / "m", {"model.layers.0.mlp.act.scales": torch.full((352,), 7.0).half()})
    with pytest.raises(UnsupportedError, match=r"mlp\.act\.scales: .*found scales of activations"):
        hf.describe(path)


@pytest.mark.parametrize(("value", "refused"), [(0.0, False), (0.5, True)])
def test_a_bias_that_the_configuration_denies_must_be_zero(
    checkpoint: Path, tmp_path: Path, value: float, refused: bool
) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.full((128,), value).bfloat16()}
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: expected no bias") if refused else nullcontext():
        load(changed(checkpoint, tmp_path / "m", bias), mode="off")


def test_tensors_without_a_place_are_told(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "draft.head": torch.ones(3)}
    hf.describe(changed(checkpoint, tmp_path / "m", more))
    assert "no place for 1 tensors, which are left out: draft.head" in caplog.text


def test_it_is_not_saved_as_if_it_were_dense(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, mode="off")
    with pytest.raises(ConfigError, match="copy the checkpoint instead"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{nonsense", "[1]", '{"max_new_tokens": -3}'])
def test_bad_settings_of_generation_are_told_before_a_weight_is_read(checkpoint: Path, tmp_path: Path, content: str) -> None:
    path = changed(checkpoint, tmp_path / "m", {})
    (path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected settings of generation"):
        hf.describe(path)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["off", "soft"])
def test_decode_stays_on_int4(checkpoint: Path, mode: str, compiled: bool) -> None:
    """Off, on, and both traced by Dynamo: decode stays on int4, prefill takes the twin when on, the tokens are the same.

    (Compiled through Inductor: `tests/test_linear.py`.)
    """
    expected = load(checkpoint, mode="off").generate(ids_of(1, 24), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    model = load(checkpoint, mode=mode)
    if compiled:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)  # type: ignore[method-assign]
    paths.calls.clear()
    out = model.generate(ids_of(1, 24), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    decode = {path for (path, m) in paths.calls if m == 1}
    prefill = {path for (path, m) in paths.calls if m == 16}
    assert decode == {paths.Path.INT4}
    assert prefill == {paths.Path.TWIN if mode == "soft" else paths.Path.INT4}
    assert torch.equal(out, expected)


def test_a_device_begins_before_the_checkpoint_is_opened(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    opened = hf._open
    monkeypatch.setattr(cpu, "begin", seen.append)
    monkeypatch.setattr(hf, "_open", lambda *args: seen.append("opened") or opened(*args))
    twinweight.load(checkpoint, mode="off")
    assert seen == [CPU, "opened"]


def test_off_is_the_same_as_not_having_twins(checkpoint: Path) -> None:
    off, on = load(checkpoint, mode="off"), load(checkpoint, mode="soft")
    crossovers = Fixed()
    load(checkpoint, mode="off", crossovers=crossovers)
    assert not any(crossovers.asked)  # nothing about twins is measured
    assert twins.twin_bytes(off) == 0
    ids = ids_of(1, 40)
    with torch.inference_mode(), twins.twins_in_use(on, False):
        assert torch.equal(off(input_ids=ids).logits, on(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_twins_drop_and_come_back(checkpoint: Path, kind: str) -> None:
    model = load(checkpoint, twin_dtype=REQUEST[kind], crossovers=Fixed(kind))
    held = twins.twin_bytes(model)
    assert held == sum(twin.nbytes(kind, m.out_features, m.in_features, CPU) for m in int4_linears(model).values())
    names = set(model.state_dict())
    assert not any("twin" in name for name in names | {n for n, _ in model.named_parameters()})
    ids = ids_of(1, 40)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        assert twins.drop_twins(model) == held
        assert twins.twin_bytes(model) == 0
        paths.calls.clear()
        model(input_ids=ids)
        assert {p for p, _ in paths.calls} == {paths.Path.INT4}
        assert twins.build_twins(model) == 14
        addresses = [m.twin.data_ptr() for m in int4_linears(model).values() if m.twin is not None]
        assert twins.build_twins(model) == 14
        assert addresses == [m.twin.data_ptr() for m in int4_linears(model).values() if m.twin is not None]
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_reloading_weights_refreshes_twins_in_place(checkpoint: Path, kind: str) -> None:
    model = load(checkpoint, twin_dtype=REQUEST[kind], crossovers=Fixed(kind))
    name, linear = next(iter(int4_linears(model).items()))
    assert linear.twin is not None
    address, old = linear.twin.data_ptr(), linear.twin.clone()
    state = model.state_dict()
    state[f"{name}.weight_packed"] = state[f"{name}.weight_packed"].flip(0)
    model.load_state_dict(state)
    assert linear.twin.data_ptr() == address
    assert not torch.equal(linear.twin, old)
    other = Int4Linear(linear.int4_weight)
    other.build_twin(kind)
    assert torch.equal(linear.twin, other.twin)
    error = (twin.dequantize(linear.twin, linear.twin_scales) - linear.int4_weight.dequantize(torch.float32)).abs().amax(1)
    assert bool((error <= (0 if linear.twin_scales is None else 0.51 * linear.twin_scales)).all())


def at_memory(monkeypatch: pytest.MonkeyPatch, spare: int, total: int = 1 << 40) -> None:
    """Memory in which, at utilization 0.9 and once the weights are in place, `spare` bytes are left."""
    monkeypatch.setattr(hf, "read_memory", lambda device: memory.Memory(total, round(total * 0.1) + spare))


def weights_and_floor(checkpoint: Path, kv_floor: int) -> int:
    """What is charged before twins: int4 and dense weights, KV floor, `stream`'s scratch, the peak of building a twin."""
    described = hf.describe(checkpoint)
    device, shapes = torch.device("cpu"), described.shapes.values()
    backend = hf.backend_for(device)
    int4 = sum(backend.weight_bytes(s.n, s.k, s.group_size, s.act_order, s.symmetric) for s in shapes)
    scratch = max(hf.scratch_bytes(s.n, s.k, described.dtype, device) for s in shapes)
    kv = kv_floor * hf.kv_bytes_per_token(described.config, described.dtype)
    return int4 + described.dense_bytes + kv + scratch + hf.TILE_BYTES


def test_soft_keeps_what_fits_and_says_once_what_missed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = sorted(4 * m.out_features * m.in_features for m in int4_linears(load(checkpoint)).values())
    at_memory(monkeypatch, weights_and_floor(checkpoint, 64) + sum(sizes[:5]))
    with caplog.at_level(logging.WARNING, logger="twinweight"):
        model = load(checkpoint, kv_floor=64)
    built = [m for m in int4_linears(model).values() if m.twin is not None]
    assert 0 < len(built) < 14
    assert twins.twin_bytes(model) <= sum(sizes[:5])
    (record,) = caplog.records
    for word in (f"{14 - len(built)} of 14 twins do not fit", "GiB", "utilization"):
        assert word in record.getMessage()


def test_hard_raises_before_anything_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_memory(monkeypatch, weights_and_floor(checkpoint, 64) + 1000)
    monkeypatch.setattr(hf, "_load_int4", lambda *a: pytest.fail("read a weight"))
    with pytest.raises(BudgetError, match="left for twins"):
        load(checkpoint, mode="hard", kv_floor=64)


def test_running_out_of_memory_keeps_int4(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, count = Int4Linear.build_twin, 0

    def failing(self: Int4Linear, dtype: torch.dtype) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise torch.OutOfMemoryError("out of memory")
        real(self, dtype)

    monkeypatch.setattr(Int4Linear, "build_twin", failing)
    with caplog.at_level(logging.WARNING, logger="twinweight"):
        model = load(checkpoint)
    assert sum(m.twin is not None for m in int4_linears(model).values()) == 3
    assert len(caplog.records) == 1
    assert model.generate(ids_of(1, 24), max_new_tokens=2, do_sample=False).shape == (1, 26)


@pytest.mark.parametrize(
    ("ours", "switch", "mode"),
    [(None, "1", "soft"), ("off", "1", "off"), ("hard", None, "hard"), (None, None, "soft"), (None, "0", "off")],
)
def test_the_environment_sets_the_mode(
    ours: str | None, switch: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TWINWEIGHT_MODE", ours), ("VLLM_W4A16_PREFILL_BF16", switch)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert modes.from_environment(os.environ) == mode


def test_the_twin_dtype_is_the_measured_one(checkpoint: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = load(checkpoint, crossovers=Fixed(dtype))
        assert {m.twin.dtype for m in int4_linears(model).values() if m.twin is not None} == {dtype}


def test_batches_and_streaming_work(checkpoint: Path) -> None:
    model = load(checkpoint)
    assert model.generate(ids_of(3, 9), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (3, 13)
    seen: list[torch.Tensor] = []

    class Streamer:
        put = staticmethod(seen.append)
        end = staticmethod(lambda: None)

    out = model.generate(ids_of(1, 9), max_new_tokens=4, min_new_tokens=4, do_sample=False, streamer=Streamer())
    assert torch.equal(torch.cat([s.flatten() for s in seen]), out[0])


def test_it_moves_and_changes_dtype(checkpoint: Path) -> None:
    model = load(checkpoint).to(torch.float16)
    assert model(input_ids=ids_of(1, 20)).logits.dtype == torch.float16
    assert all(m.twin is not None for m in int4_linears(model).values())


def damaged(checkpoint: Path, out: Path, **config: object) -> Path:
    shutil.copytree(checkpoint, out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | config))
    return out


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"hidden_size": 256}, CheckpointError, ["model.safetensors", "shape"]),
        ({"num_hidden_layers": 3}, CheckpointError, ["layers.2"]),
        ({"quantization_config": None}, UnsupportedError, ["dense"]),
        ({"architectures": ["NoSuchModel"]}, UnsupportedError, ["NoSuchModel"]),
        ({"model_type": "nosuch"}, UnsupportedError, ["config.json"]),
    ],
)
def test_bad_checkpoints_are_refused(
    checkpoint: Path, tmp_path: Path, config: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        load(damaged(checkpoint, tmp_path / "bad", **config))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "on"}, "mode"),
        ({"device": "cuda"}, "GPU"),
        ({"device": "abacus"}, "abacus"),
        ({"dtype": torch.float32}, "dtype"),
        ({"twin_dtype": "int4"}, "twin dtype is 'int4', expected one of dense, int8, fp8"),
    ],
)
def test_bad_arguments_are_refused(checkpoint: Path, options: dict[str, object], word: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=word):
        load(checkpoint, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_the_config_says(tied: bool, tmp_path: Path) -> None:
    synth.write(TINY | {"tie_word_embeddings": tied}, tmp_path, group_size=32)
    model = load(tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    model.tie_weights()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
