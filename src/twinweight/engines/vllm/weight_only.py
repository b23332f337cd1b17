"""Which layers quantize nothing but their weight, found by what they compute: names of schemes come and go with versions."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from twinweight import paths
from twinweight.engines.vllm import compat, ranks
from twinweight.engines.vllm.kernel import TwinLinearKernel
from twinweight.engines.vllm.kinds import kind_of

log = logging.getLogger("vllm.twinweight")

_SIZES = (1 / 64, 1.0, 64.0)  # a fixed scale is too coarse for one of them or too narrow for another
_OUTLIER, _EVERY = 64.0, 64  # with such a value in each 64, integers scaled by token, group or tensor lose the others
_ROWS = (1, 8)  # times four: few, and more than a decode step's

TOLERANCE = 0.01
"""Of the rms of a row's output. bf16 sums differ by 0.004; 8-bit integers by 0.1, 8-bit floats by 0.02."""


def weight_only(kernels: dict[str, TwinLinearKernel]) -> dict[str, TwinLinearKernel]:
    """The kernels whose layers are linear in their activations; says which are not. One layer of a kind answers for all.

    Ranks decide alike: what one of them refuses, all do.
    """
    kinds = {name: (kind_of(k), type(getattr(k.layer, "scheme", k.layer.quant_method)).__name__) for name, k in kernels.items()}
    first = {kind: kernels[name] for name, kind in reversed(kinds.items())}
    counted = paths.calls.copy()
    linear = [is_linear(kernel) for kernel in first.values()]
    paths.calls.clear()
    paths.calls.update(counted)
    answers = [all(one) for one in zip(*ranks.gather(linear), strict=True)]
    refused = {kind for kind, answer in zip(first, answers, strict=True) if not answer}
    for kind, owner in refused:
        hint = "; VLLM_CPU_INT4_W4A8=0 leaves them in 16 bits" if first[kind, owner].device.type == "cpu" else ""
        log.info("Twinweight leaves %s of %s alone: activations are quantized%s", kind, owner, hint)
    return {name: kernel for name, kernel in kernels.items() if kinds[name] not in refused}


@torch.inference_mode()
def is_linear(kernel: TwinLinearKernel) -> bool:
    """Whether f(a + b) = f(a) + f(b), row by row, where no sum needs rounding."""
    device = next(kernel.layer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(kernel.k, generator=generator), torch.zeros(kernel.k)
    small[::_EVERY] = 0
    large[::_EVERY] = _OUTLIER
    # Integers whose sums bf16 holds, and a float of 8 bits does not.
    whole = torch.randint(-64, 65, (2, kernel.k), generator=generator).float()
    a, b = (torch.stack((other, *(w * size / 64 for size in _SIZES))) for other, w in zip((small, large), whole, strict=True))
    rows = [x.to(device, kernel.dtype) for x in (a, b, a + b)]
    return all(_additive(*(compat.apply(kernel.layer, x.repeat(times, 1))[-4:].float() for x in rows)) for times in _ROWS)


def _additive(a: Tensor, b: Tensor, both: Tensor) -> bool:
    error, rms = (x.square().mean(-1).sqrt() for x in (both - a - b, both))
    return bool((error <= TOLERANCE * rms).all())
