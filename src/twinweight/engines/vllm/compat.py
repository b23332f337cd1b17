"""The one file that reaches into vLLM beyond its public surface. Read in 0.26, 0.28, 0.30 and 0.32; run in 0.26 to 0.32.

vLLM is imported inside functions: the plugin is loaded in processes that never need it.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch

from twinweight import reserves
from twinweight.engines.vllm import hooks
from twinweight.kv_cache import KVFloor
from twinweight.memory import read_memory
from twinweight.plan import Budget

log = logging.getLogger("vllm.twinweight")  # below vLLM's logger, whose handlers and level it shares

OLDEST, NEWEST = (0, 26), (0, 32)
POOL = "twinweight"
"""The tag of the twins' memory where vLLM can put a server to sleep."""

_choosing = threading.local()


def known() -> bool:
    """Whether this vLLM is one of those that were read."""
    found = re.match(r"(\d+)\.(\d+)", version())
    return found is not None and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST


@functools.cache
def warn_unknown() -> None:
    """Say once why nothing happens."""
    log.warning("Twinweight knows vLLM %d.%d to %d.%d and stays off in %s", *OLDEST, *NEWEST, version())


# --- start-up ---


def on_arguments(action: Callable[[Any], None]) -> None:
    """Call action(engine arguments) before they become a configuration, for which a front end inspects the model. Other
    processes have none.
    """
    if (module := sys.modules.get("vllm.engine.arg_utils")) is not None:
        hooks.of_class(module.EngineArgs, "create_engine_config", before=action)


def cuda_name() -> str | None:
    """The GPU's name where vLLM runs on NVIDIA's, None elsewhere: asked as vLLM asks before it has a configuration."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name()) if current_platform.is_cuda() else None


def on_init_device(action: Callable[[Any, Any], None]) -> None:
    """Call action(worker, vllm_config) before a worker opens its device, in whatever process and under whatever executor.

    Not at init_worker: a spawned worker loads its plugins inside that.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    hooks.of_class(WorkerWrapperBase, "init_device", before=lambda wrapper: action(wrapper.worker, wrapper.vllm_config))


def additional_config(vllm_config: Any) -> object:
    """What `--additional-config` gave."""
    return vllm_config.additional_config


def remember_active(vllm_config: Any, settings: dict[str, Any]) -> None:
    """Put the settings where vLLM's hash of a configuration sees them, for compiled graphs and start-up plans of others."""
    given = vllm_config.additional_config
    if isinstance(given, dict):
        given[POOL] = {**settings, **given.get(POOL, {})}


def allows_twins(vllm_config: Any) -> bool:
    """Whether this server can have twins; says why not."""
    import vllm.envs as envs

    offload = vllm_config.offload_config
    reasons = {
        "VLLM_BATCH_INVARIANT=1, which a choice by rows cannot keep": envs.VLLM_BATCH_INVARIANT,
        "no room for twins, as weights are offloaded": offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size,
        "elastic expert parallelism moves weights": getattr(vllm_config.parallel_config, "enable_elastic_ep", False),
    }
    if found := [why for why, holds in reasons.items() if holds]:
        log.warning("%s: Twinweight stays off", found[0])
    return not found


def on_metrics(action: Callable[[Any], None]) -> None:
    """Call action(vllm_config) where vLLM has registered its own Prometheus metrics: in front ends that keep statistics."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    hooks.of_class(PrometheusStatLogger, "__init__", after=lambda self, vllm_config, *args, **kwargs: action(vllm_config))


def show_metrics(collector: Any) -> None:
    """Let `/metrics` ask a collector too."""
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        REGISTRY.register(collector)
        return
    # API servers that share an engine make registries at each scrape, with this one collector, which reads all their files.
    original = MultiProcessCollector.collect
    MultiProcessCollector.collect = lambda self: [*original(self), *collector.collect()]


def metric_labels(worker: Any) -> dict[str, str]:
    """Which worker of a server this is: vLLM's own number of the engine, and the rank in it."""
    return {"engine": str(worker.vllm_config.parallel_config.data_parallel_index), "rank": str(worker.rank)}


# --- the kernel list ---


def prefer(kernel: type) -> None:
    """Put a kernel class first in the platform's list, and let it pass `--linear-backend`'s filter. Idempotent."""
    import vllm.model_executor.kernels.linear as registry
    from vllm.platforms import current_platform

    kernels = registry._POSSIBLE_KERNELS.get(current_platform._enum, [])
    if kernels and kernel not in kernels:
        for backend in registry._LINEAR_BACKEND_KERNEL_MAP.values():
            if any(k in backend for k in kernels):
                backend.add(kernel)
        kernels.insert(0, kernel)


def unprefer(kernel: type) -> None:
    """The inverse of `prefer`: for a server without twins after one with them, in the same process."""
    import vllm.model_executor.kernels.linear as registry

    for kernels in registry._POSSIBLE_KERNELS.values():
        if kernel in kernels:
            kernels.remove(kernel)


def choose_inner(config: Any) -> Any:
    """The kernel class that vLLM would take without us, by all its own rules. Raises ValueError where there is none."""
    from vllm.model_executor.kernels.linear import choose_mp_linear_kernel

    _choosing.on = True
    try:
        return choose_mp_linear_kernel(config)
    finally:
        _choosing.on = False


def refusal(config: Any) -> str | None:
    """Why a layer of this kernel configuration cannot be wrapped; None where it can."""
    import vllm.envs as envs

    if getattr(_choosing, "on", False):
        return "choosing the inner kernel"
    out_type = getattr(config, "out_type", None) or config.act_type
    if config.act_type not in (torch.float16, torch.bfloat16) or out_type != config.act_type:
        return "activations are quantized"
    if not config.weight_type.is_integer() or config.weight_type.is_signed():
        return f"weights are {config.weight_type}"
    if envs.VLLM_MARLIN_INPUT_DTYPE is not None:
        return "VLLM_MARLIN_INPUT_DTYPE quantizes activations, by a check of the kernel's class"
    return None


def apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer without its bias, by its whole quantization method: what a scheme does to activations is in it."""
    y: torch.Tensor = layer.quant_method.apply(layer, x, None)
    return y


# --- memory ---


def kv_floor(worker: Any, tokens: int | None) -> KVFloor:
    """The floor of one worker: `tokens`, but at least max_model_len, without which vLLM does not start."""
    specs = list(worker.get_kv_cache_spec().values())
    least = worker.vllm_config.model_config.max_model_len
    per_token = sum(s.page_size_bytes / s.block_size for s in specs)
    needed = sum(s.max_memory_usage_bytes(worker.vllm_config) for s in specs)
    tokens = max(tokens or 0, least)
    return KVFloor(tokens, max(int(needed), round(tokens * per_token)), per_token)


def explicit_kv_bytes(worker: Any) -> int | None:
    """KV bytes that the user fixed, past all profiling."""
    given = worker.vllm_config.cache_config.kv_cache_memory_bytes
    return int(given) if given else None


def activation_bytes(worker: Any, widest: int) -> int:
    """An estimate of the activation peak (`reserves`). `Life` corrects a wrong one: it drops twins until the KV floor holds."""
    model, scheduler = worker.vllm_config.model_config, worker.vllm_config.scheduler_config
    return reserves.activation_bytes(
        tokens=scheduler.max_num_batched_tokens, widest=widest, hidden=model.get_hidden_size(),
        itemsize=model.dtype.itemsize, sequences=scheduler.max_num_seqs, vocabulary=model.get_vocab_size(),
    )  # fmt: skip


def graphs_bytes(worker: Any) -> int:
    """An estimate of what CUDA graphs take, 0 where none is captured. Corrected like activations."""
    sizes = worker.vllm_config.compilation_config.cudagraph_capture_sizes or ()
    eager = worker.vllm_config.model_config.enforce_eager
    return 0 if eager or device_of(worker).type == "cpu" else reserves.graphs_bytes(len(sizes))


def budget(worker: Any, floor: int, transient: int, reserves: tuple[tuple[str, int], ...], *, kv_unknown: bool) -> Budget:
    """What vLLM's own accounting leaves to this worker: utilization x total, less what start-up has used so far.

    On a CPU every rank of a node sees the same free memory, so each counts on its share of it only.
    """
    utilization = worker.vllm_config.cache_config.gpu_memory_utilization
    device = device_of(worker)
    if device.type == "cpu":
        total = round(worker.requested_cpu_memory / utilization)
        used, available = psutil.Process(os.getpid()).memory_info().rss, free_memory(worker)
    else:
        total, available = round(worker.requested_memory / utilization), free_memory(worker)
        used = worker.init_snapshot.free_memory - available
    kept = round(total * (1 - utilization))
    free = max(0, min(total - used, available + kept))
    kv_unknown = kv_unknown and device.type != "cpu"  # where the cache has a size of its own
    return Budget(total, free, utilization, transient, floor, reserves, kv_unknown=kv_unknown)


def device_of(worker: Any) -> torch.device:
    """The worker's device; known once it is initialised."""
    return torch.device(worker.device)


def memory_in_use(worker: Any) -> int:
    """Allocated bytes as vLLM counts weights; 0 on a CPU, where it reads the resident size instead."""
    device = device_of(worker)
    if device.type == "cpu":
        return 0
    from vllm.platforms import current_platform

    return int(current_platform.get_current_memory_usage(device))


def free_memory(worker: Any) -> int:
    """Bytes that this worker may still take: on a CPU its share of what all ranks see, of the machine or their memory node."""
    memory_in_use(worker)  # gives memory that torch keeps back to the device
    free = read_memory(device_of(worker)).free
    if device_of(worker).type != "cpu":
        return free
    with suppress(ImportError):  # a vLLM that does not look at nodes
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

        free = min(free, int(get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory))
    return free // int(worker.vllm_config.parallel_config.world_size)


@contextmanager
def forward_peak(worker: Any) -> Iterator[Callable[[], int]]:
    """How far above what stays allocated the profiling in the context went, in bytes; 0 on a CPU."""
    device = device_of(worker)
    if device.type == "cpu":
        yield lambda: 0
        return
    module = torch.get_device_module(device.type)
    module.reset_peak_memory_stats(device)
    yield lambda: int(module.max_memory_allocated(device) - module.memory_allocated(device))


def charge(worker: Any, nbytes: int) -> None:
    """Count bytes as weights, so that the KV cache is sized after them."""
    if hasattr(worker.model_runner, "model_memory_usage"):
        worker.model_runner.model_memory_usage += nbytes
    if hasattr(worker, "total_consumed"):  # of which a start-up plan is made
        worker.total_consumed += nbytes


def set_available(worker: Any, nbytes: int) -> None:
    """What the worker remembers of its KV bytes, for its log lines."""
    if hasattr(worker, "available_kv_cache_memory_bytes"):
        worker.available_kv_cache_memory_bytes = nbytes


# --- sleep ---


@contextmanager
def pool(worker: Any) -> Iterator[None]:
    """Memory that sleeping discards without a copy and that wakes at its old address, where sleep mode is on."""
    if device_of(worker).type == "cpu":
        yield
        return
    # 0.26 knows one pool a tag and destroys it inside of the next one's context, which PyTorch does not survive.
    pools = getattr(sleeper(worker), "allocator_and_pools", {})
    if isinstance(pools.get(POOL), tuple):
        pools[f"{POOL} {len(pools)}"] = pools[POOL]
    with worker._maybe_get_memory_pool_context(tag=POOL):
        yield


def wakes_alone() -> bool:
    """Whether waking some tags wakes ours too (from about 0.31 on only "weights" and "kv_cache" can be left asleep)."""
    import vllm.device_allocator as allocators

    return hasattr(allocators, "DEFERRABLE_TAGS")


def wake_pool(worker: Any) -> None:
    """Map the twins' memory again, where `wake_up` did not."""
    if (allocator := sleeper(worker)) is not None:
        allocator.wake_up([POOL])


def trim_pool(worker: Any) -> None:
    """Give the memory of dropped twins back to the device, where sleep mode is on: as vLLM trims a pool that it left."""
    found = getattr(allocator := sleeper(worker), "allocator_and_pools", {}).get(POOL, [])
    for pool, *_ in [found] if isinstance(found, tuple) else found:
        from vllm.device_allocator.cumem import unmap_and_release

        for segment in pool.snapshot():
            if segment["allocated_size"] == 0 and segment["address"] in allocator.pointer_to_data:
                unmap_and_release(allocator._python_free_callback(segment["address"]))


def sleeper(worker: Any) -> Any:
    """vLLM's allocator of memory that sleeps, where there is one."""
    if not getattr(worker.vllm_config.model_config, "enable_cumem_allocator", False):
        return None
    from vllm.device_allocator import get_mem_allocator_instance

    return get_mem_allocator_instance()


# --- the group ---


def gather(value: Any) -> list[Any]:
    """The values of all ranks of the tensor-parallel group, by rank. Every rank must call it equally often."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return [value]
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, value, group=group.cpu_group)
    return found


def rank() -> int:
    """This process's place in its tensor-parallel group."""
    from vllm.distributed.parallel_state import get_tp_group

    return int(get_tp_group().rank_in_group)


def chunk(worker: Any) -> int:
    """The most rows of a step."""
    return int(worker.vllm_config.scheduler_config.max_num_batched_tokens)


def version() -> str:
    """vLLM's."""
    import vllm

    return str(vllm.__version__)


def draft_rows(worker: Any) -> int:
    """Rows of one sequence in a decode step: 1, and one more for each speculated token."""
    speculative = worker.vllm_config.speculative_config
    return 1 + (speculative.num_speculative_tokens if speculative is not None else 0)


@contextmanager
def forward_context(worker: Any) -> Iterator[None]:
    """What kernels may ask for while they run outside of a model's forward: the configuration in force."""
    from vllm.config import set_current_vllm_config

    with torch.inference_mode(), set_current_vllm_config(worker.vllm_config):
        yield
