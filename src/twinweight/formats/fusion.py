"""Where a linear module of a model lies in the checkpoint, fused and split modules included.

A model may want `q_proj`, `k_proj`, `v_proj` where the checkpoint has one `qkv_proj`, or the reverse. `resolve` says which
rows of which stored modules make a module, a pure function of names and shapes; the others check and read such parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError, UnsupportedError
from twinweight.formats.common import Int4Kind
from twinweight.formats.registry import Format
from twinweight.safetensors_file import TensorInfo
from twinweight.weight import SYMMETRIC_ZERO, Int4Weight, concat_rows

Shape = tuple[int, int]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused module -> its parts, top to bottom."""


@dataclass(frozen=True)
class Part:
    """Output features start..stop-1 of the stored module `name`, whose shape is (N, K)."""

    name: str
    start: int
    stop: int
    shape: Shape

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.shape[0]


def resolve(
    name: str, shapes: Mapping[str, Shape], stored: Callable[[str], Shape | None], file: Path | None = None
) -> tuple[Part, ...]:
    """The parts of stored modules that, one below the other, are module `name` of the model.

    name, and the names in the answer: in the checkpoint's naming. shapes: (N, K) of the model's modules, `name` and its
    siblings among them. stored: (N, K) of a module in the checkpoint (`stored_shape`), None where it has none. file: for
    error messages (`Checkpoint.source`). An ordinary module gives one whole part.

    Raises CheckpointError where it is not stored in any form, or the shapes do not add up.
    """
    wanted = shapes[name]
    parts = _find(name, shapes, stored, file)
    if not parts:
        expected = "the module, or a fused or split form of it"
        raise CheckpointError(file=file, tensor=f"{name}.weight", expected=expected, found="none")
    rows, widths = sum(p.stop - p.start for p in parts), {p.shape[1] for p in parts}
    if (rows, widths) != (wanted[0], {wanted[1]}):
        found = f"{rows} rows of {', '.join(p.name for p in parts)}, K = {', '.join(map(str, sorted(widths)))}"
        raise CheckpointError(file=file, tensor=f"{name}.weight", expected=f"shape {list(wanted)}", found=found)
    return parts


def stored_shape(fmt: Format, name: str) -> Shape | None:
    """(N, K) of a linear module in the checkpoint, dense or int4; None where it has no tensors. For `resolve`."""
    if fmt.owned_tensors(name):
        return fmt.shape(name)
    if f"{name}.weight" not in fmt.ckpt:
        return None
    info = fmt.ckpt.info(f"{name}.weight")
    if len(info.shape) != 2:
        found = str(list(info.shape))
        raise CheckpointError(file=info.file, tensor=f"{name}.weight", expected="a matrix [N, K]", found=found)
    check_float(info, f"{name}.weight")
    return info.shape[0], info.shape[1]


def check_float(info: TensorInfo, name: str) -> None:
    """Raises UnsupportedError where a dense tensor holds codes that want a scale (FP8, integers)."""
    if info.dtype not in _FLOATS:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise UnsupportedError(file=info.file, tensor=name, expected=f"{expected}, or int4", found=str(info.dtype))


def is_int4(fmt: Format, parts: Sequence[Part]) -> bool:
    """Whether all parts of a module are int4; False: all dense.

    Raises CheckpointError where config and file disagree, UnsupportedError where some parts are int4 and some dense.
    """
    kinds = {part.name: fmt.is_quantized(part.name) for part in parts}
    if len(set(kinds.values())) > 1:
        dense = next(name for name, int4 in kinds.items() if not int4)
        expected = f"all of {', '.join(kinds)} int4, or all dense"
        raise UnsupportedError(file=fmt.ckpt.source, tensor=f"{dense}.weight", expected=expected, found="some of each")
    return all(kinds.values())


def check_int4(fmt: Format, parts: Sequence[Part]) -> Int4Kind:
    """Check the headers of all parts of an int4 module, and say what `read_int4` will give.

    Raises what `Format.check` raises, and UnsupportedError where the parts have several group sizes or an act-order each.
    """
    kinds = [fmt.check(p.name, p.shape) for p in parts]
    if len({k.group_size for k in kinds}) > 1 or (len(kinds) > 1 and any(k.act_order for k in kinds)):
        expected = "one group size and no act-order, to be joined"
        found = "; ".join(f"{p.name}: {k}" for p, k in zip(parts, kinds, strict=True))
        raise UnsupportedError(file=fmt.ckpt.source, tensor=parts[0].name, expected=expected, found=found)
    return replace(kinds[0], symmetric=all(k.symmetric for k in kinds))


def read_int4(fmt: Format, parts: Sequence[Part], dtype: torch.dtype) -> Int4Weight:
    """The int4 weight of one module, scales in `dtype`. Rows out of a fused weight are copied: the rest can be freed.

    Raises what `check_int4` and `Format.read` raise.
    """
    check_int4(fmt, parts)
    weights = [_rows(fmt.read(p.name, dtype), p) for p in parts]
    if len(weights) == 1:
        return weights[0]
    if any(w.zeros is not None for w in weights):  # a symmetric part beside an asymmetric one
        weights = [w if w.zeros is not None else replace(w, zeros=_eights(w)) for w in weights]
    return concat_rows(weights)


def read_dense(ckpt: Checkpoint, parts: Sequence[Part], suffix: str) -> Tensor:
    """`<module>.<suffix>` ("weight" or "bias") of the parts of one module, rows joined. Raises CheckpointError if absent."""
    tensors = []
    for part in parts:
        name = f"{part.name}.{suffix}"
        tensor = ckpt.read(name)
        if tensor.shape[:1] != part.shape[:1]:
            found = str(list(tensor.shape))
            raise CheckpointError(file=ckpt.info(name).file, tensor=name, expected=f"{part.shape[0]} rows", found=found)
        tensors.append(tensor if part.whole else tensor[part.start : part.stop].clone())
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _find(name: str, shapes: Mapping[str, Shape], stored: Callable[[str], Shape | None], file: Path | None) -> tuple[Part, ...]:
    if (shape := stored(name)) is not None:
        return (_whole(name, shape),)
    parent, dot, last = name.rpartition(".")
    prefix = parent + dot
    for fused, members in FUSED.items():
        if last in members and (shape := stored(prefix + fused)) is not None:
            rows = [shapes.get(prefix + m, (0, 0))[0] for m in members]
            if sum(rows) != shape[0]:
                expected = f"{' + '.join(map(str, rows))} rows for {', '.join(members)}"
                raise CheckpointError(file=file, tensor=prefix + fused, expected=expected, found=f"{shape[0]} rows")
            start = sum(rows[: members.index(last)])
            return (Part(prefix + fused, start, start + shapes[name][0], shape),)
        if last == fused:
            split = {prefix + m: s for m in members if (s := stored(prefix + m)) is not None}
            if len(split) == len(members):
                return tuple(_whole(m, s) for m, s in split.items())
    return ()


def _whole(name: str, shape: Shape) -> Part:
    return Part(name, 0, shape[0], shape)


def _rows(weight: Int4Weight, part: Part) -> Int4Weight:
    if part.whole:
        return weight
    view = weight.rows(part.start, part.stop)
    zeros = view.zeros.clone() if view.zeros is not None else None
    return replace(view, packed=view.packed.clone(), scales=view.scales.clone(), zeros=zeros)


def _eights(weight: Int4Weight) -> Tensor:
    return torch.full(weight.scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=weight.scales.device)
