"""The embedded engine: a W4A16 checkpoint as a `transformers` model, in one process, on the CPU or a GPU.

Everything is decided from headers before a weight is read: which modules are int4, what they weigh, which twins fit.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from twinweight import formats, modes, rounded, twin
from twinweight.checkpoint import Checkpoint
from twinweight.crossover import Crossovers, Shape
from twinweight.engines.head import flatten_head, rounded_bytes
from twinweight.engines.layout import Layout, dense_bytes, lay_out, stored_tensors
from twinweight.engines.variables import warn_of_others
from twinweight.errors import CheckpointError, ConfigError, UnsupportedError
from twinweight.formats import fusion
from twinweight.kernels import backend_for
from twinweight.kernels.prepared import TILE_BYTES
from twinweight.kernels.stream import scratch_bytes
from twinweight.kv_cache import bytes_per_token, key_value_heads
from twinweight.linear import Int4Linear
from twinweight.memory import read_memory
from twinweight.plan import Budget, check_mode
from twinweight.twins import TwinState, attach, build_twins, decide

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

log = logging.getLogger("twinweight")

_KV_FLOOR_TOKENS = 4096


def load(
    path: str | Path,
    *,
    mode: str | None = None,
    twin_dtype: str | None = None,
    head: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    utilization: float = 0.9,
    kv_floor: int | None = None,
    crossovers: Crossovers | None = None,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Load a W4A16 checkpoint (compressed-tensors, GPTQ, AWQ) as a transformers model in eval mode.

    path: a local model directory.
    mode: "off", "soft" or "hard"; None reads TWINWEIGHT_MODE, then means "soft".
    twin_dtype: "dense", or 8-bit twins too, which round activations: "int8" on a CPU, "fp8", "fp8-exact" or "fp8-row" on a GPU;
    None reads TWINWEIGHT_DTYPE, then means "dense". A weight or device that cannot have them gets dense twins, with a message.
    head: "dense" (as it is), or on a CPU "int8": few rows of the output head go by 8 bits a weight where that is faster, but in
    mode "off"; None reads TWINWEIGHT_HEAD, then means "dense".
    device: None takes the GPU if there is one.
    dtype: of activations and scales, bf16 or fp16; None is the checkpoint's on a GPU and bf16 on a CPU, whose int4 kernel is
    fast in bf16.
    utilization: share of the device's memory that may be used at all.
    kv_floor: KV-cache tokens that twins may never take; None is 4096, or the model's maximum where that is less.
    crossovers: measurements to reuse; progress: show a bar (None: on a terminal).

    Raises CheckpointError or UnsupportedError for a checkpoint that cannot be run, BudgetError where mode "hard" does not
    fit, ConfigError for a bad argument. Nothing half-loaded stays.
    """
    warn_of_others(os.environ)
    chosen = modes.from_environment(os.environ) if mode is None else check_mode(mode)
    request, round_head = twin.request(twin_dtype), rounded.request(head) == "int8" and chosen != "off"
    if kv_floor is not None and (not isinstance(kv_floor, int) or kv_floor < 0):
        raise ConfigError(f"KV floor is {kv_floor!r}, expected tokens, 0 or more")
    where = _device(device)
    backend_for(where).begin(where)
    ckpt, fmt, model = _open(path, where, dtype)
    dtype = model.dtype
    layout = lay_out(model, ckpt, fmt, where, dtype)
    crossovers = crossovers or Crossovers()
    held = rounded_bytes(model) if round_head and where.type == "cpu" else 0
    budget = _budget(model, layout, where, dtype, utilization, kv_floor, held)
    decided = decide(layout.shapes, budget, chosen, crossovers, request=request)
    with _bar(len(layout.parts) + len(decided.twins), progress) as step:
        for name in layout.parts:
            _load_int4(model, name, layout, fmt, ckpt, where, dtype)
            step(name)
        _load_dense(model, ckpt, layout, where)
        flatten_head(model, rounded=round_head)
        attach(model, TwinState(decided, crossovers))
        build_twins(model, step)
    model.save_pretrained = _not_saved  # type: ignore[method-assign]
    model.eval()  # type: ignore[no-untyped-call]
    return model


@dataclass(frozen=True)
class Description:
    """A checkpoint as its headers describe it. shapes: of the int4 modules, as the device would hold them."""

    architecture: str
    format: str
    config: PretrainedConfig
    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    dense_bytes: int


def describe(path: str | Path, device: str | torch.device | None = "cpu") -> Description:
    """What `load` would load, without reading a weight. Raises CheckpointError and UnsupportedError as `load` does."""
    where = _device(device)
    ckpt, fmt, model = _open(path, where, None)
    layout = lay_out(model, ckpt, fmt, where, model.dtype)
    return Description(type(model).__name__, fmt.name, model.config, model.dtype, layout.shapes, dense_bytes(model, layout))


def _open(
    path: str | Path, device: torch.device, dtype: torch.dtype | None
) -> tuple[Checkpoint, formats.Format, PreTrainedModel]:
    ckpt = Checkpoint.open(path)
    fmt = formats.detect(ckpt)
    config, generation = _config(ckpt), _generation_config(ckpt)
    model = _skeleton(config, _dtype(dtype, config, device), ckpt)
    if generation is not None:
        model.generation_config = generation
    return ckpt, fmt, model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}, which torch does not know") from error
    try:
        there = where.type == "cpu" or torch.get_device_module(where.type).is_available()
    except (AttributeError, RuntimeError):
        there = False
    if not there:
        raise ConfigError(f"device is {str(device)!r}, but torch sees no GPU of that kind")
    if where.type != "cpu" and where.index is None:
        where = torch.device(where.type, torch.get_device_module(where.type).current_device())
    return where


def _config(ckpt: Checkpoint) -> PretrainedConfig:
    """The transformers config without its quantization: the weights are ours to read."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(ckpt.path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedError(
            file=ckpt.path / "config.json", expected="a model that transformers knows", found=str(error).split("\n")[0]
        ) from error
    except Exception as error:  # whatever transformers raises for a field that is of another type
        raise _damaged(ckpt, error) from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _dtype(dtype: torch.dtype | None, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    stored = config.dtype or getattr(config.get_text_config(), "dtype", None)
    if dtype is None:
        if device.type == "cpu":
            return torch.bfloat16
        return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype is {dtype}, expected torch.bfloat16 or torch.float16: W4A16 has 16-bit activations")
    return dtype


def _skeleton(config: PretrainedConfig, dtype: torch.dtype, ckpt: Checkpoint) -> PreTrainedModel:
    """The model with parameters on the meta device and its buffers (rotary tables, ...) computed."""
    import transformers
    from accelerate import init_empty_weights

    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None or not hasattr(cls, "generate"):
        raise UnsupportedError(
            file=ckpt.path / "config.json",
            expected="architectures: a model of transformers that generates",
            found=architecture or "none",
        )
    try:
        with init_empty_weights(include_buffers=False):
            return cls._from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    except Exception as error:  # whatever a model raises for sizes that do not go together
        raise _damaged(ckpt, error) from error


def _damaged(ckpt: Checkpoint, error: Exception) -> CheckpointError:
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return CheckpointError(file=ckpt.path / "config.json", expected="the configuration of a model", found=found)


def _budget(
    model: PreTrainedModel,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    utilization: float,
    kv_floor: int | None,
    held: int,
) -> Budget:
    """The budget as it will be once the int4 and dense weights are in place: sizes are known, nothing is loaded yet.

    held: bytes that the weights take besides.
    """
    memory = read_memory(device)
    backend = backend_for(device)
    weights = sum(backend.weight_bytes(s.n, s.k, s.group_size, s.act_order, s.symmetric) for s in layout.shapes.values())
    dense = dense_bytes(model, layout) + held
    if kv_floor is None:
        kv_floor = min(_KV_FLOOR_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", _KV_FLOOR_TOKENS))
    reserve = kv_floor * kv_bytes_per_token(model.config, dtype)
    scratch = max((scratch_bytes(s.n, s.k, dtype, device) for s in layout.shapes.values()), default=0)
    kept = (("scratch of stream", scratch),)
    return Budget(memory.total, memory.free - weights - dense, utilization, TILE_BYTES, reserve, kept, weights + dense)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that one token adds to the KV cache: keys and values of every layer that keeps them, in the activation dtype."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    try:
        return bytes_per_token(text.num_hidden_layers, kinds, *_kv_heads(text), dtype.itemsize)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError: layers differ, and each has a config
        layers = [text.per_layer_config[i] for i in range(text.num_hidden_layers)]
        return sum(
            bytes_per_token(1, kinds[i : i + 1] if kinds else None, *_kv_heads(layer), dtype.itemsize)
            for i, layer in enumerate(layers)
        )


def _kv_heads(text: PretrainedConfig) -> tuple[int, int]:
    """Key-value heads and their size; none where a model has no attention. Of latent attention, of which some versions of
    transformers keep the latents alone, as if all keys and values were kept.
    """
    heads = getattr(text, "num_attention_heads", None) or 0
    if getattr(text, "kv_lora_rank", None):
        return heads, -(-(text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim) // 2)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return key_value_heads(lambda name: getattr(text, name, None), heads), head_dim


def _load_int4(
    model: PreTrainedModel,
    name: str,
    layout: Layout,
    fmt: formats.Format,
    ckpt: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replace one `nn.Linear` by an `Int4Linear`. The file's pages leave memory with the tensors read."""
    old = model.get_submodule(name)
    parts = layout.parts[name]
    weight = fusion.read_int4(fmt, parts, dtype).to(device)
    bias = fusion.read_dense(ckpt, parts, "bias").to(device, dtype, copy=True) if old.bias is not None else None
    for part in parts:
        stored = f"{part.name}.bias"
        if old.bias is None and stored in ckpt and bool(ckpt.read(stored).any()):  # GPTQ stores zeros for every module
            raise CheckpointError(file=ckpt.source, tensor=stored, expected="no bias, by config.json", found="one")
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Int4Linear(weight, bias))


def _load_dense(model: PreTrainedModel, ckpt: Checkpoint, layout: Layout, device: torch.device) -> None:
    """Fill what is stored as it is, in the dtype the model gave it, then tie, then move the computed buffers."""
    tensors = dict(stored_tensors(model))
    for name, source in layout.dense.items():
        module_name, _, leaf = name.rpartition(".")
        dtype = tensors[name].dtype
        if isinstance(source, str):
            data = ckpt.copy(source, device, dtype)
        else:
            data = fusion.read_dense(ckpt, source, leaf).to(device, dtype, copy=True)
        module = model.get_submodule(module_name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(data, requires_grad=False)
        else:
            module._buffers[leaf] = data
    _tie(model, layout)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)
    if left := [n for n, p in model.named_parameters() if p.is_meta]:
        raise CheckpointError(
            file=ckpt.source, tensor=left[0], expected="data for every parameter", found=f"none for {len(left)}"
        )


def _tie(model: PreTrainedModel, layout: Layout) -> None:
    """Tie what the configuration ties, but for what the file holds with other values: that stays, as in transformers."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = {name: model.get_parameter(name) for name in tied if name in layout.dense}
    model.tie_weights()
    for name in tied:
        module, _, leaf = name.rpartition(".")
        if module in layout.parts:  # an int4 head has no dense weight to tie
            model.get_submodule(module)._parameters.pop(leaf, None)
        elif name in stored and not torch.equal(stored[name], model.get_parameter(name)):
            model.get_submodule(module)._parameters[leaf] = stored[name]


def _generation_config(ckpt: Checkpoint) -> GenerationConfig | None:
    from transformers import GenerationConfig

    file = ckpt.path / "generation_config.json"
    if not file.exists():
        return None
    try:
        return GenerationConfig.from_pretrained(ckpt.path, local_files_only=True)
    except Exception as error:  # whatever transformers raises for a field of another type
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(file=file, expected="settings of generation", found=found) from error


def _not_saved(*args: object, **kwargs: object) -> None:
    """In place of `save_pretrained`, which would write int4 tensors under a config that calls them dense."""
    raise ConfigError(
        "a model with int4 weights is not saved by save_pretrained: twins are derived, copy the checkpoint instead"
    )


@contextmanager
def _bar(total: int, show: bool | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error; yields what to call with the name of each finished weight."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=total)

        def step(name: str) -> None:
            bar.update(task, advance=1, description=name[-40:])

        yield step
