"""vLLM's own int4 weight of a layer, freed where a copy of it serves every call.

The copy then takes the place of what it was made of, and costs nothing. There is no way back: vLLM cannot write new weights
into what is gone, so it takes a server that says so (`"reload": false`).
"""

from __future__ import annotations

import torch

from twinweight.engines.vllm.kernel import TwinLinearKernel
from twinweight.paths import Path


def is_spare(kernel: TwinLinearKernel) -> bool:
    """Whether no call of the layer reaches vLLM's kernel. With a twin some will, should that make room for the KV cache."""
    return kernel.own is not None and kernel.twin is None and not {Path.INNER, Path.TWIN} & set(kernel.route[1::2])


def free(kernel: TwinLinearKernel) -> int:
    """Free what vLLM's kernel reads of the layer, but for the bias. Returns bytes. Tensors keep their shapes; whoever reads one
    gets an error of torch's, and a call of the kernel one of ours.
    """
    layer = kernel.layer
    tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    freed = sum(_free(t.data) for name, t in tensors if name != "bias")
    kernel.freed += freed
    return freed


def _free(tensor: torch.Tensor) -> int:
    """Bytes. What shares its memory with something larger stays."""
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes()
    if nbytes > tensor.nbytes or not storage.resizable():
        return 0
    storage.resize_(0)
    return nbytes
