"""What goes where: a model's modules and a checkpoint's tensors matched and checked, from headers alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twinweight import formats
from twinweight.checkpoint import Checkpoint
from twinweight.crossover import Shape
from twinweight.engines.names import match_names
from twinweight.errors import CheckpointError, UnsupportedError
from twinweight.formats import fusion
from twinweight.formats.fusion import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("twinweight")

_COMPUTED = r"rotary_emb\.inv_freq$"  # what old checkpoints store and models compute


@dataclass(frozen=True)
class Layout:
    """What goes where, from headers alone, by the model's names.

    parts: int4 module -> the stored modules it is made of. shapes: of the int4 modules. dense: parameter or buffer that is
    stored as it is -> its tensor in the checkpoint, or the parts it is joined from.
    """

    parts: Mapping[str, tuple[Part, ...]]
    shapes: Mapping[str, Shape]
    dense: Mapping[str, str | tuple[Part, ...]]


def lay_out(model: PreTrainedModel, ckpt: Checkpoint, fmt: formats.Format, device: torch.device, dtype: torch.dtype) -> Layout:
    """Match modules and tensors, and check every header. Raises before anything is read."""
    names = match_names(model, ckpt)
    linears = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    stored = {names.module(name): shape for name, shape in linears.items()}
    parts: dict[str, tuple[Part, ...]] = {}
    shapes: dict[str, Shape] = {}
    for name, (n, k) in linears.items():
        if f"{name}.weight" in tied and f"{name}.weight" not in names.tensors and not fmt.owned_tensors(names.module(name)):
            continue
        found = fusion.resolve(names.module(name), stored, lambda module: fusion.stored_shape(fmt, module), ckpt.source)
        if not fusion.is_int4(fmt, found):
            continue
        kind = fusion.check_int4(fmt, found)
        parts[name] = found
        shapes[name] = Shape(n, k, kind.group_size, kind.symmetric, kind.act_order, dtype, device)
    dense: dict[str, str | tuple[Part, ...]] = {}
    for name, tensor in stored_tensors(model):
        module = name.rpartition(".")[0]
        if name in names.tensors:
            if module not in parts:
                dense[name] = names.tensors[name]
                _check_shape(ckpt, names.tensors[name], tensor)
        elif module in parts or name in tied:
            continue
        elif module in linears:
            dense[name] = fusion.resolve(names.module(module), stored, lambda m: fusion.stored_shape(fmt, m), ckpt.source)
        else:
            raise CheckpointError(file=ckpt.source, tensor=name, expected=f"shape {list(tensor.shape)}", found="no such tensor")
    _check_left(model, ckpt, fmt, [p.name for found in parts.values() for p in found], dense.values())
    return Layout(parts, shapes, dense)


def _check_shape(ckpt: Checkpoint, name: str, tensor: Tensor) -> None:
    info = ckpt.info(name)
    if info.shape != tensor.shape:
        raise CheckpointError(file=info.file, tensor=name, expected=f"shape {list(tensor.shape)}", found=str(list(info.shape)))
    if tensor.is_floating_point():
        fusion.check_float(info, name)


def _check_left(
    model: PreTrainedModel,
    ckpt: Checkpoint,
    fmt: formats.Format,
    int4: Iterable[str],
    dense: Iterable[str | tuple[Part, ...]],
) -> None:
    """What the model has no place for: refused where it would change what is computed, else told."""
    used = {tensor for name in int4 for tensor in (*fmt.owned_tensors(name), f"{name}.bias")}
    for source in dense:
        names = (
            [source] if isinstance(source, str) else [f"{part.name}.{leaf}" for part in source for leaf in ("weight", "bias")]
        )
        used.update(names)
    expected = re.compile("|".join([_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    left = [name for name in ckpt.names() if name not in used and name not in tied and not expected.search(name)]
    for name in left:
        if name.endswith(".scales") and f"{name.removesuffix('scales')}qweight" not in ckpt:  # AWQ's, behind an activation
            expectation = "an architecture whose activations are not scaled (this engine does not run ScaledActivation)"
            raise UnsupportedError(file=ckpt.info(name).file, tensor=name, expected=expectation, found="scales of activations")
    if left:
        log.warning("%s: the model has no place for %d tensors, which are left out: %s%s", ckpt.path.name, len(left),
                    ", ".join(left[:3]), ", ..." if len(left) > 3 else "")  # fmt: skip


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers: what a checkpoint must hold. Tied parameters appear under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def dense_bytes(model: PreTrainedModel, layout: Layout) -> int:
    """Bytes of what is stored as it is."""
    tensors = dict(stored_tensors(model))
    return sum(tensors[name].numel() * tensors[name].dtype.itemsize for name in layout.dense)
