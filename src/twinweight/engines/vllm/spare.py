"""vLLM's own int4 weight of a layer, freed where a copy of it serves every call.

The copy then takes the place of what it was made of, and costs nothing. There is no way back: vLLM cannot write new weights
into what is gone, so it takes a server that says so (`"reload": false`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twinweight.engines.vllm import compat, hooks
from twinweight.engines.vllm.kernel import TwinLinearKernel
from twinweight.paths import Path

_WANT_WEIGHTS = (
    "reload_weights", "start_weight_update", "start_draft_weight_update", "update_weights", "finish_weight_update",
    "twinweight_refresh", "sleep", "discard", "reset_weights", "compute_weight_checksums", "save_sharded_state",
    "save_tensorized_model", "elastic_ep_execute",
)  # fmt: skip
"""Methods of workers, of any vLLM, that read or write weights once a server runs."""

_NAMES = ("w_q_name", "w_s_name", "w_zp_name", "w_gidx_name")
"""Where a kernel has the names of the layer's parameters that it reads; 0.32 has no last one."""


def can_free(worker: Any) -> bool:
    """Whether weights of vLLM may go. Not where they may be put to sleep."""
    return compat.sleeper(worker) is None


def is_spare(kernel: TwinLinearKernel) -> bool:
    """Whether no call of the layer reaches vLLM's kernel. With a twin some will, should that make room for the KV cache."""
    return kernel.own is not None and kernel.twin is None and not {Path.INNER, Path.TWIN} & set(kernel.route[1::2])


def free(worker: Any, kernels: Iterable[TwinLinearKernel]) -> int:
    """Free the weights that are spare, and still there. From then on the worker refuses what would read or write them. Returns
    the bytes.
    """
    before = compat.memory_in_use(worker)
    freed = sum(free_one(kernel) for kernel in kernels if is_spare(kernel) and not kernel.freed)
    compat.charge(worker, compat.memory_in_use(worker) - before)
    if freed:
        for name in _WANT_WEIGHTS:
            hooks.of_object(worker, name, _refuse)
    return freed


def free_one(kernel: TwinLinearKernel) -> int:
    """Replace what vLLM's kernel reads of the layer by empty tensors. Returns the bytes that they had."""
    names = {getattr(kernel.inner, given, None) for given in _NAMES} | kernel.made
    for name, parameter in kernel.layer.named_parameters(recurse=False):
        if name in names:
            kernel.freed += parameter.nbytes
            parameter.data = parameter.data.new_empty(0)
    return kernel.freed


def _refuse(method: Callable[..., Any], *args: object, **kwargs: object) -> None:
    raise RuntimeError(f'Twinweight: no {method.__name__} here: "reload": false had int4 weights of vLLM freed')
