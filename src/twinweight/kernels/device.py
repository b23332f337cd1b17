"""What the kernels ask of a torch device: its `DeviceTraits`, and to run on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from .forms import DeviceTraits


@cache
def traits_of(device: torch.device) -> DeviceTraits:
    """Traits of a GPU, for "meta" of the current one; for the CPU those of a small NVIDIA one, with Triton's interpreter, which
    truncates to bf16.
    """
    if device.type == "meta" and torch.cuda.is_available():
        return traits_of(torch.device("cuda", torch.cuda.current_device()))
    if device.type != "cuda":
        return DeviceTraits("nvidia", warp_size=32, multiprocessors=8, shared_memory=101376, rounds_bf16=False)
    p = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # gfx942 and gfx11/12 have no such conversion (gfx950 has; using integers there is right, and not the fastest)
        return DeviceTraits("amd", p.warp_size, p.multi_processor_count, shared_memory=65536, rounds_bf16=False)
    return DeviceTraits(
        "nvidia",
        p.warp_size,
        p.multi_processor_count,
        getattr(p, "shared_memory_per_block_optin", 101376),  # missing from torch's stubs
        rounds_bf16=True,
        ptx=True,
        wgmma=p.major == 9,
        gluon=p.major >= 8 and has_gluon(),
    )


def has_gluon() -> bool:
    """Whether this Triton has what Gluon's kernels, imported here, are written in. It is young, and its names may change."""
    try:
        from . import ampere, hopper, hopper_few  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which a Triton launch goes to the GPU of `tensor`, not the current one; nothing on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
