"""A model's first start on a machine: compile what timing will launch from the moment its name is known.

A front end inspects the model before any worker makes a layer, for 10 s and more where nothing is cached. Run as a module this
is the process that meanwhile reads the model's config.json and has its kernels compiled: workers find them in Triton's cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from twinweight import cache
from twinweight.checkpoint import read_json
from twinweight.engines.vllm import compat, own
from twinweight.engines.vllm.config import Config
from twinweight.kernels import compilers
from twinweight.kernels.prepared import takes_group
from twinweight.search import FULL
from twinweight.sharding import shard

log = logging.getLogger("vllm.twinweight")

_BEGUN = "_TWINWEIGHT_BEGUN"
"""A variable that processes of one server hand on, JSON: the host and number of the process that compiles, and the file that is
there once it has.
"""

_NICENESS = 10
_PATIENCE = 60.0  # seconds
_DOWNLOAD = 15  # seconds that config.json is waited for: vLLM fetches it first, and inspects the model for as long
_DTYPES = {"half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}


def begin(arguments: Any, config: Config) -> None:
    """Start the process, given vLLM's engine arguments, where kernels will be timed on NVIDIA GPUs and it never ran for such a
    server. Whatever fails only costs time.

    Of other GPUs nobody here knows how to ask for their traits without taking memory of theirs.
    """
    try:
        if _running() is not None:
            return
        os.environ.pop(_BEGUN, None)  # an earlier server's of this process
        store = cache.default()
        if store is not None and config.crossover is None and (device := compat.cuda_name()) is not None:
            asked = _asked(arguments)
            done = store.mark(**asked, device=device)
            if not done.exists():
                process = compilers.spawn(__name__, json.dumps({**asked, "done": str(done)}))
                os.environ[_BEGUN] = json.dumps([platform.node(), process.pid, str(done)])
    except Exception as error:
        log.info("Twinweight: kernels are not compiled early: %s", error)


def has_begun() -> bool:
    """Whether a process of this server, on this host, compiles or has compiled."""
    begun = _begun()
    return begun is not None and (Path(begun[1]).exists() or _running() is not None)


def wait() -> None:
    """Until it has ended."""
    if (process := _running()) is not None:
        with contextlib.suppress(psutil.Error):
            process.wait(_PATIENCE)


def _begun() -> tuple[int, str] | None:
    """Number and file of the process, where it is one of this host."""
    with contextlib.suppress(ValueError):
        host, pid, done = json.loads(os.environ.get(_BEGUN, "[]"))
        return (pid, done) if host == platform.node() else None
    return None


def _running() -> psutil.Process | None:
    if (begun := _begun()) is not None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(begun[0])
            return process if __name__ in process.cmdline() else None  # a zombie has no command line
    return None


def _asked(arguments: Any) -> dict[str, Any]:
    """What engine arguments say of a model. tokens: of a step, None where vLLM chooses."""
    return {
        "model": arguments.hf_config_path or arguments.model, "revision": arguments.revision, "dtype": str(arguments.dtype),
        "tp": arguments.tensor_parallel_size, "tokens": arguments.max_num_batched_tokens,
    }  # fmt: skip


def launches(config: Mapping[str, Any], dtype: str, tp: int, tokens: int | None) -> Iterator[Callable[[], object]]:
    """Calls that launch what timing one rank's layers will, those of an own copy, for the model of a config.json. dtype: as
    vLLM takes it. Nothing for a model whose weights are not quantized.
    """
    text = {**config, **config.get("text_config", {})}
    if "quantization_config" not in text:
        return
    asked = str(text.get("dtype") or text.get("torch_dtype")) if dtype == "auto" else dtype
    torch_dtype = _DTYPES.get(asked, torch.bfloat16)
    for kind in dict.fromkeys(shard(config, tp).weights.values()):
        if not kind.act_order and takes_group(kind.k, kind.group_size):
            yield from own.launches(kind.n, kind.k, kind.group_size, torch_dtype, tokens or FULL, symmetric=kind.symmetric)


def _config_json(model: str, revision: str | None) -> Path:
    """Where a model's config.json is on this machine, to which the front end may be about to bring it."""
    if Path(model).is_dir():
        return Path(model) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    for _ in range(_DOWNLOAD):
        if isinstance(found := try_to_load_from_cache(model, "config.json", revision=revision), str):
            return Path(found)
        time.sleep(1)
    raise FileNotFoundError(f"config.json of {model}")


def main(model: str, revision: str | None, done: str, **asked: Any) -> None:
    """Compile, wait for it, and make the file. Raises where it cannot be, and makes none."""
    os.nice(_NICENESS)
    ahead = compilers.Compilers()
    ahead.start()
    try:
        compilers.leave_closed(torch.device("cuda", 0))  # a worker is about to look how much of its memory is free
        calls = list(launches(read_json(_config_json(model, revision)), **asked))
        ahead.add(calls)
    finally:
        ahead.finish()
    Path(done).parent.mkdir(parents=True, exist_ok=True)
    Path(done).touch()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
