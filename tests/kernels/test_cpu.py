"""The CPU backend: ATen's layout is read back exactly, and its kernel computes what the expansion holds."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_close, random_weight
from twinweight.kernels import backend_for, cpu, dense_linear
from twinweight.kernels.reference import linear as reference
from twinweight.weight import Int4Weight, from_values


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    group: int
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True
    act_order: bool = False

    def weight(self) -> Int4Weight:
        return random_weight(self.n, self.k, self.group, self.dtype, self.symmetric, self.act_order, seed=self.n + self.k)


CASES = [
    Case(64, 128, 128),
    Case(1, 32, 32),
    Case(577, 160, 32),
    Case(100, 320, 64, torch.float16),
    Case(33, 859, 859),
    Case(48, 77, 77, torch.float16, symmetric=False),
    Case(130, 256, 128, symmetric=False),
    Case(130, 384, 64, symmetric=False, act_order=True),
    Case(65, 512, 32, torch.float16, act_order=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_gives_the_expansion_bit_for_bit(case: Case) -> None:
    weight = case.weight()
    kernel = cpu.prepare(weight)
    eye = torch.eye(case.k, dtype=case.dtype)
    out = cpu.int4_linear(eye, kernel, None).T
    for dtype in cpu.twin_dtypes(case.dtype):
        twin = cpu.empty_twin(case.n, case.k, dtype, torch.device("cpu"))
        cpu.expand(kernel, twin)
        assert torch.equal(twin.to(case.dtype), out)
        assert torch.equal(dense_linear(eye, twin, None).T, out)
    if weight.zeros is None:
        assert torch.equal(out, weight.dequantize())


@pytest.mark.parametrize("zero", range(16))
def test_zero_points_are_exact_but_for_four_that_may_be_rounded(zero: int) -> None:
    torch.manual_seed(zero)
    scales = (torch.rand(64, 4) * 0.01 + 0.001).to(torch.bfloat16)
    weight = from_values(torch.randint(0, 16, (64, 128)), scales, torch.full((64, 4), zero, dtype=torch.uint8), group_size=32)
    kernel = cpu.prepare(weight)
    twin = torch.empty(64, 128)
    cpu.expand(kernel, twin)
    error = (twin.double() - weight.dequantize(torch.float64)).abs() / scales.double().repeat_interleave(32, dim=1)
    assert error.max() <= (7 / 256 if zero in (1, 2, 13, 14) else 0)
    assert torch.equal(cpu.int4_linear(torch.eye(128, dtype=torch.bfloat16), kernel, None).T, twin.to(torch.bfloat16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prepare_can_be_undone(case: Case) -> None:
    weight = case.weight()
    kernel = cpu.prepare(weight)
    back = cpu.unprepare(kernel, symmetric=case.symmetric, group_size=case.group)
    for name in ("packed", "scales", "zeros", "g_idx"):
        a, b = getattr(weight, name), getattr(back, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    size = cpu.weight_bytes(case.n, case.k, case.group, case.act_order, case.symmetric)
    assert size == kernel.nbytes


@pytest.mark.parametrize("m", [0, 1, 3, 17])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_paths_are_close_to_float64(case: Case, m: int) -> None:
    weight = case.weight()
    kernel = cpu.prepare(weight)
    x = torch.randn(m, case.k).to(case.dtype)
    bias = torch.randn(case.n).to(case.dtype) * 0.1
    expected = reference(x, weight, bias)
    twin = torch.empty(case.n, case.k)
    cpu.expand(kernel, twin)
    if m:
        assert_close(cpu.int4_linear(x, kernel, bias), expected, max_err=1e-2, rms_err=6e-3)
    assert_close(dense_linear(x, twin, bias), expected, max_err=1e-2, rms_err=6e-3)


def test_the_backend_of_the_cpu_is_aten() -> None:
    assert backend_for(torch.device("cpu")) is cpu


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="already runs with the instruction set that was asked for")
@pytest.mark.parametrize("instructions", ["avx2", "default"])
def test_layouts_of_other_instruction_sets_are_read_too(instructions: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "identity or undone", __file__],
        env={**os.environ, "ATEN_CPU_CAPABILITY": instructions}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:]
