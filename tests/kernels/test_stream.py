"""`stream` computes what the twin computes, in any number of tiles."""

from dataclasses import dataclass

import pytest
import torch

from tests.helpers import assert_close, random_weight
from twinweight.kernels import Backend, cpu, dense_linear, gpu, stream
from twinweight.kernels.reference import linear as reference

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without a GPU: Triton's interpreter
BACKENDS: dict[str, tuple[Backend, torch.device]] = {"cpu": (cpu, torch.device("cpu")), "gpu": (gpu, GPU)}


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    group: int
    dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True
    act_order: bool = False
    bias: bool = False


CASES = [
    Case(7, 64, 128, 128),
    Case(0, 130, 64, 32, bias=True),
    Case(1, 577, 96, 32, bias=True),
    Case(5, 200, 160, 32, torch.float16, symmetric=False),
    Case(33, 130, 128, 64, symmetric=False, act_order=True, bias=True),
]


@pytest.mark.parametrize("tile", [1, 1 << 30], ids=["tiles of 64 rows", "one tile"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_twin(case: Case, name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SCRATCH_BYTES", tile)
    monkeypatch.setattr(stream, "_CPU_TILE_BYTES", tile)
    backend, device = BACKENDS[name]
    weight = random_weight(case.n, case.k, case.group, case.dtype, case.symmetric, case.act_order).to(device)
    kernel = backend.prepare(weight)
    x = torch.randn(case.m, case.k, device=device).to(case.dtype)
    bias = torch.randn(case.n, device=device).to(case.dtype) if case.bias else None
    y = stream.stream_linear(backend, x, kernel, bias)
    twin = backend.empty_twin(case.n, case.k, backend.stream_dtype(case.dtype), device)
    backend.expand(kernel, twin)
    assert y.dtype == case.dtype
    assert_close(y, reference(x, weight, bias), max_err=1e-2)
    if tile > 1:
        assert torch.equal(y, dense_linear(x, twin, bias))
    eye = torch.eye(case.k, device=device, dtype=case.dtype)
    assert torch.equal(stream.stream_linear(backend, eye, kernel, None).T, twin.to(case.dtype))


@pytest.mark.parametrize("rows", [(0, 64), (64, 130), (128, 130)])
def test_expands_some_rows(rows: tuple[int, int]) -> None:
    for backend, device in BACKENDS.values():
        kernel = backend.prepare(random_weight(130, 96, 32, symmetric=False, act_order=True).to(device))
        whole, part = (torch.empty(n, 96, dtype=torch.bfloat16, device=device) for n in (130, rows[1] - rows[0]))
        backend.expand(kernel, whole)
        backend.expand_rows(kernel, *rows, part)
        assert torch.equal(part, whole[rows[0] : rows[1]])


def test_rows_of_the_cpu_start_at_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        cpu.expand_rows(cpu.prepare(random_weight(130, 64, 32)), 1, 65, torch.empty(64, 64))


def test_the_scratch_is_bounded() -> None:
    head = (128256, 4096)
    assert stream.scratch_bytes(*head, torch.bfloat16, torch.device("cuda")) <= 256 << 20
    assert stream.scratch_bytes(*head, torch.bfloat16, torch.device("cpu")) <= 16 << 20
    assert stream.scratch_bytes(100, 64, torch.bfloat16, torch.device("cuda")) == 100 * 64 * 2


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("n", "k"), [(8192, 28672), (57344, 8192), (51200, 5120), (128256, 4096), (4096, 14336), (130, 1 << 20)]
)
def test_tiles_are_few_and_alike(n: int, k: int, device: str) -> None:
    most = stream.SCRATCH_BYTES if device == "cuda" else stream._CPU_TILE_BYTES
    rows = stream.tile_rows(n, k, 2, torch.device(device))
    assert rows * k * 2 <= most or rows == 64
    tiles = -(-n // rows)
    assert tiles == max(1, -(-n // max(64, most // (2 * k) // 64 * 64)))
    assert rows - (n - (tiles - 1) * rows) < 256 * tiles
    assert tiles == 1 or rows % 64 == 0


def test_the_last_tile_of_a_large_weight_fills_a_gpu() -> None:
    """It was 3520 rows behind 4672."""
    assert stream.tile_rows(8192, 28672, 2, torch.device("cuda")) == 4096
