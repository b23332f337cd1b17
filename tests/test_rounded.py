"""A weight in 8 bits beside itself, for few rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twinweight
from twinweight import one_row, rounded, synth
from twinweight.engines import hf
from twinweight.engines.head import OutputHead, rounded_bytes
from twinweight.engines.vllm import heads
from twinweight.errors import ConfigError
from twinweight.plan import Budget
from twinweight.rounded import Rounded
from twinweight.timing import Timing


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size are large, and 8 bits are faster for up to two rows."""
    monkeypatch.setattr(one_row, "LARGE", 1)

    def timed(calls: dict[str, Any], **how: object) -> dict[str, Timing]:
        rows = len(calls["exact"]())
        return {name: Timing(*[1.0 if (name == "rounded") == (rows <= 2) else 2.0] * 3) for name in calls}

    monkeypatch.setattr(rounded, "interleaved", timed)
    monkeypatch.setattr(one_row, "faster", lambda weight, other: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_off_by_half_a_scale_and_products_see_it_so(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "_CHUNK", 96 * 10)  # ten rows at a time
    weight = torch.randn(64, 96).to(dtype)
    weight[3] = 0
    bits = Rounded(weight)
    off = (bits.data.double() * bits.scales.double().unsqueeze(1) - weight.double()).abs()
    # A scale is rounded to the dtype, so that the largest value may be off by as much more.
    assert bool((off <= bits.scales.double().unsqueeze(1) * (0.5 + 127 * 2**-8)).all())
    assert off.mean() < 0.3 * bits.scales.double().mean()
    assert bool((bits.dense()[3] == 0).all())
    x = torch.randn(3, 96).to(dtype)
    seen = x.double() @ (bits.data.double() * bits.scales.double().unsqueeze(1)).t()
    assert float((bits(x).double() - seen).norm() / seen.norm()) < 5e-3
    other = torch.randn(64, 96).to(dtype)
    bits.refill(other)
    assert torch.equal(bits.data, Rounded(other).data)


@pytest.mark.usefixtures("small")
def test_as_many_rows_as_are_faster_go_by_it() -> None:
    head = OutputHead(96, 64, bias=False).bfloat16().requires_grad_(False)
    head.choose()
    assert head.few is not None
    assert head.few.rounded is None
    head.choose(rounded=True)
    assert (head.few.most, head.few.rounded is not None) == (2, True)
    for rows in (1, 2, 3):
        x = torch.randn(1, rows, 96).bfloat16()
        weight = head.weight if rows > 2 else Rounded(head.weight).dense()
        assert float((head(x) - nn.functional.linear(x, weight)).norm() / head(x).norm()) < 1e-2
        exact = torch.equal(head(x), nn.functional.linear(x, head.weight))
        assert exact == (rows > 2)


class Head:
    """A head of vLLM's on a CPU."""

    def __init__(self) -> None:
        self.weight = torch.randn(64, 96).bfloat16()
        self.cpu_linear: Any = nn.functional.linear


@pytest.mark.usefixtures("small")
def test_a_head_of_vllm_goes_by_it_and_follows_its_weight() -> None:
    head, x = Head(), torch.randn(2, 96).bfloat16()

    def product(rows: int = 2) -> Tensor:
        return head.cpu_linear(x[:rows], head.weight, None)  # type: ignore[no-any-return]

    heads.quicken([head])
    assert heads.chosen([head]) == [False]
    heads.quicken([head], rounded=True)
    assert heads.chosen([head]) == [True]
    assert torch.equal(product(), Rounded(head.weight)(x))
    wide = torch.randn(3, 96).bfloat16()
    assert torch.equal(head.cpu_linear(wide, head.weight, None), nn.functional.linear(wide, head.weight))
    bias = torch.randn(64).bfloat16()
    assert torch.equal(head.cpu_linear(x, head.weight, bias), nn.functional.linear(x, head.weight, bias))
    for again in (heads.refresh, lambda found: heads.quicken(found, rounded=True)):  # parameters were written; a reload left it
        head.weight.copy_(torch.randn(64, 96))
        again([head])
        assert torch.equal(product(1), Rounded(head.weight)(x[:1]))


def test_what_is_not_faster_is_not_kept(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    even = {name: Timing(1.0, 1.0, 1.0) for name in ("rounded", "exact")}
    monkeypatch.setattr(rounded, "interleaved", lambda calls, **how: even)
    head, ours = Head(), OutputHead(96, 64, bias=False).bfloat16()
    heads.quicken([head], rounded=True)
    ours.choose(rounded=True)
    assert heads.chosen([head]) == [False]
    assert ours.few is not None
    assert ours.few.rounded is None


@pytest.mark.usefixtures("small")
def test_what_multiplies_with_another_weight_keeps_it() -> None:
    bits, other = Rounded(torch.randn(64, 96).bfloat16()), torch.randn(64, 96).bfloat16()
    assert rounded.most_rows(bits, lambda x: nn.functional.linear(x, other)) == 0
    assert rounded.most_rows(bits, lambda x: nn.functional.linear(x, bits.dense())) == 2


def test_small_heads_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    head, ours = Head(), OutputHead(96, 64, bias=False).bfloat16()
    with caplog.at_level("INFO", "vllm.twinweight"):
        heads.quicken([head], rounded=True)
    ours.choose(rounded=True)
    assert heads.chosen([head]) == [False]
    assert ours.few is not None
    assert ours.few.rounded is None
    assert "no output head here" in caplog.text


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 352,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 199,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.usefixtures("small")
def test_a_model_is_loaded_with_it_and_its_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synth.write(TINY, tmp_path, group_size=32)
    budgets: list[Budget] = []
    right = hf._budget

    def watched(*args: Any) -> Budget:
        budgets.append(right(*args))
        return budgets[-1]

    monkeypatch.setattr(hf, "_budget", watched)
    for request, mode in (("dense", "soft"), ("int8", "soft"), ("int8", "off")):
        monkeypatch.setenv("TWINWEIGHT_HEAD", request)
        model = twinweight.load(tmp_path, mode=mode, device="cpu", progress=False)
        head: Any = model.get_output_embeddings()
        assert (head.few.rounded is not None) == (request == "int8" and mode == "soft")
        assert head.weight is model.get_input_embeddings().weight  # which stays as it is
        logits = model(torch.arange(5)[None], logits_to_keep=1).logits
        assert logits.shape == (1, 1, 199)
    assert [b.weights - budgets[0].weights for b in budgets] == [0, 199 * (128 + 2), 0]


def test_what_may_be_asked_for() -> None:
    assert rounded.request(None, {}) == "dense"
    assert rounded.request(None, {"TWINWEIGHT_HEAD": "int8"}) == "int8"
    assert rounded.request("dense", {"TWINWEIGHT_HEAD": "int8"}) == "dense"
    for given, environ in (("int4", {}), (None, {"TWINWEIGHT_HEAD": "int4"})):
        with pytest.raises(ConfigError, match="expected one of dense, int8"):
            rounded.request(given, environ)


def test_its_bytes_count_where_there_is_a_large_plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    heads_ = {nn.Linear(96, 64, bias=False, dtype=torch.bfloat16): 64 * 96 + 2 * 64, nn.Identity(): 0}
    for head, nbytes in heads_.items():
        model: Any = SimpleNamespace(get_output_embeddings=lambda head=head: head)
        assert rounded_bytes(model) == 0
        with monkeypatch.context() as patch:
            patch.setattr(one_row, "LARGE", 64 * 96 * 2)
            assert rounded_bytes(model) == nbytes
