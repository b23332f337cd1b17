"""The GPU backend's own part: layouts and column order. Its kernels have their tests beside this file."""

import threading
from dataclasses import replace

import pytest
import torch
import triton.runtime.cache

from tests.helpers import assert_close, random_weight
from twinweight.kernels import gpu
from twinweight.kernels.reference import linear as reference
from twinweight.paths import Path

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without a GPU: Triton's interpreter


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_begins_in_the_background_and_never_fails_by_it(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    hashed: list[int] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr(triton.runtime.cache, "triton_key", lambda: 1 // 0 if fails else hashed.append(1))
    gpu.begin(DEVICE)
    for thread in threading.enumerate():
        if thread.name == "twinweight-begin":
            thread.join()
    assert told == []
    assert hashed == ([] if fails else [1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_every_path_computes_the_same_weight(symmetric: bool, act_order: bool) -> None:
    weight = random_weight(48, 96, 32, torch.float16, symmetric, act_order).to(DEVICE)
    kernel = gpu.prepare(weight)
    twin = gpu.empty_twin(48, 96, torch.float16, DEVICE)
    gpu.expand(kernel, twin)
    assert torch.equal(twin, weight.dequantize())
    eye = torch.eye(96, dtype=torch.float16, device=DEVICE)
    x, bias = torch.randn(5, 96, device=DEVICE).half(), torch.randn(48, device=DEVICE).half()
    for path in (gpu.int4_linear, gpu.fused_linear):
        assert torch.equal(path(eye, kernel, None).T, twin)
        assert_close(path(x, kernel, bias), reference(x, weight, bias), max_err=1e-2)
    back = gpu.unprepare(kernel, symmetric=symmetric, group_size=32)
    for name in ("packed", "scales", "zeros", "g_idx"):
        a, b = getattr(weight, name), getattr(back, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    assert gpu.weight_bytes(48, 96, 32, act_order, symmetric) == kernel.nbytes
    assert gpu.twin_bytes(48, 96, torch.float16, DEVICE) == twin.untyped_storage().nbytes()


@pytest.mark.parametrize("path", [Path.INT4, Path.FUSED])
@pytest.mark.parametrize(
    ("m", "k", "with_bias"), [(130, 128, True), (33, 1024, False), (0, 128, True)], ids=["whole", "K split", "no rows"]
)
def test_what_was_worked_out_serves_other_x_and_weights(path: Path, m: int, k: int, with_bias: bool) -> None:
    weights = [gpu.prepare(random_weight(256, k, 64, torch.float16).to(DEVICE)) for _ in range(2)]
    x, other = (torch.randn(m, k, device=DEVICE).half() for _ in range(2))
    biases = [torch.randn(256, device=DEVICE).half() if with_bias else None for _ in weights]
    again, wide = gpu.again(path, x, weights[0], biases[0]), gpu.again(path, x.view(1, m, k), weights[0], biases[0])
    assert again is not None
    assert wide is not None
    for w, bias in zip(weights, biases, strict=True):
        expected = (gpu.int4_linear if path is Path.INT4 else gpu.fused_linear)(other, w, bias)
        assert torch.equal(again(other, w, bias), expected)
        assert torch.equal(wide(other.view(1, m, k), w, bias), expected.view(1, m, 256))


def test_nothing_is_worked_out_for_calls_that_must_be_looked_at() -> None:
    weight = random_weight(256, 128, 64, torch.float16).to(DEVICE)
    x, w = torch.randn(300, 128, device=DEVICE).half(), gpu.prepare(weight)
    assert gpu.again(Path.STREAM, x, w, None) is None
    assert gpu.again(Path.FUSED, x.t().contiguous().t(), w, None) is None
    assert gpu.again(Path.FUSED, torch.randn(300 * 128 + 1, device=DEVICE).half()[1:].view(300, 128), w, None) is None
    ordered = gpu.prepare(random_weight(256, 128, 64, torch.float16, act_order=True).to(DEVICE))
    assert gpu.again(Path.FUSED, x, ordered, None) is None


def test_scales_that_are_an_odd_view_are_moved() -> None:
    weight = random_weight(16, 64, 32, torch.bfloat16, True).to(DEVICE)
    odd = torch.cat((weight.scales.flatten()[:1], weight.scales.flatten()))[1:].view_as(weight.scales)
    moved = gpu.prepare(replace(weight, scales=odd)).scales
    assert odd.data_ptr() % 4
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, weight.scales)


def test_int4_fused_and_stream_are_three_paths() -> None:
    assert gpu.paths_without_twin() == (Path.INT4, Path.FUSED, Path.STREAM)
    assert gpu.twin_dtypes(torch.bfloat16) == (torch.bfloat16,)
