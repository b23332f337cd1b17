"""8-bit twins in the embedded engine: asked for, near the dense model, and dense where they do not go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from tests.engines.test_hf import CASES, TINY, Case, Fixed, ids_of, load, needs_int8, write
from tests.helpers import assert_close
from twinweight import paths, twin
from twinweight.crossover import Shape
from twinweight.kernels import int8
from twinweight.measured import Measured
from twinweight.twins import int4_linears


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    write(out, CASES[0])
    return out


class Mixed(Fixed):
    """int8 where there is such a twin, else fp32."""

    def get(self, shape: Shape, *, with_twins: bool = True, lossy: Sequence[str] = ()) -> Measured:
        self.dtype = "int8" if "int8" in lossy else "float32"
        return super().get(shape, with_twins=with_twins, lossy=lossy)


@needs_int8
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[5]], ids=str)
def test_int8_twins_are_near_the_dense_float32_model(case: Case, tmp_path: Path) -> None:
    reference = write(tmp_path, case)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"dtype": "float32"}))
    dense.load_state_dict(reference, strict=True)
    model = load(tmp_path, dtype=getattr(torch, case.dtype), twin_dtype="int8", crossovers=Fixed("int8"))
    assert {m.twin_kind for m in int4_linears(model).values()} == {"int8"}
    ids = ids_of(1, 40)
    with torch.inference_mode():
        paths.calls.clear()
        expected = dense.eval().to(torch.float32)(input_ids=ids).logits
        assert_close(model(input_ids=ids).logits, expected, max_err=0.15, rms_err=0.08)
        assert {path for path, _ in paths.calls} == {paths.Path.TWIN}


@needs_int8
def test_8_bit_twins_are_asked_for_and_never_the_default(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(twin.VARIABLE, raising=False)
    for request, variable, kind in (
        (None, None, "float32"), ("dense", "int8", "float32"), (None, "int8", "int8"), ("int8", None, "int8"),
    ):  # fmt: skip
        if variable is not None:
            monkeypatch.setenv(twin.VARIABLE, variable)
        model = load(checkpoint, twin_dtype=request, crossovers=Fixed("int8" if kind == "int8" else "float32"))
        assert {m.twin_kind for m in int4_linears(model).values()} == {kind}
        monkeypatch.delenv(twin.VARIABLE, raising=False)


@pytest.mark.parametrize("request_", ["int8", "fp8", "fp8-exact", "fp8-row"])
def test_a_machine_without_8_bits_gets_dense_twins_and_one_message(
    checkpoint: Path, request_: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(int8, "available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="twinweight"):
        model = load(checkpoint, twin_dtype=request_)
    assert {m.twin_kind for m in int4_linears(model).values()} == {"float32"}
    (record,) = caplog.records
    assert f"14 of 14 weights get dense twins, not {request_}" in record.getMessage()
    assert ("VNNI" if request_ == "int8" else "only on a GPU") in record.getMessage()


@needs_int8
def test_a_weight_that_does_not_fit_gets_a_dense_twin(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(int8, "MAX_K", 128)
    with caplog.at_level(logging.WARNING, logger="twinweight"):
        model = load(checkpoint, twin_dtype="int8", crossovers=Mixed())
    for linear in int4_linears(model).values():
        assert linear.twin_kind == ("int8" if linear.in_features <= 128 else "float32")
    (record,) = caplog.records
    assert "2 of 14 weights get dense twins, not int8. int8: K is 352, at most 128" in record.getMessage()
    ids = ids_of(1, 40)
    with torch.inference_mode():
        assert bool(torch.isfinite(model(input_ids=ids).logits).all())
