"""Random tensors of a W4A16 checkpoint in the layout of each format, and the `quantization_config` that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from twinweight.errors import ConfigError

Shape: TypeAlias = tuple[int, ...]
Packer: TypeAlias = "Callable[[str, int, int, Recipe], Iterator[Entry]]"

BIAS_STD = 0.02
GROUP_SIZES = (-1, 32, 64, 128)
_LOW_BITS = 0x11111111  # the lowest bit of each of the eight nibbles in a word
_CHUNK = 1 << 18  # words; 1 MiB stays in the cache through all passes over it


@dataclass(frozen=True)
class Recipe:
    """How to quantize: group_size -1 means one group a row, dtype is that of scales and dense weights."""

    format: str
    group_size: int
    symmetric: bool
    dtype: str

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}; known: {', '.join(FORMATS)}")
        if self.dtype not in ("bfloat16", "float16"):
            raise ConfigError(f"dtype {self.dtype!r}: expected bfloat16 or float16")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group size {self.group_size}: expected 32, 64, 128, or -1 for one group a row")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float16


@dataclass(frozen=True)
class Entry:
    """One tensor to write: `make` draws it from a generator."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[torch.Generator], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dense(name: str, shape: Shape, constant: float | None, recipe: Recipe) -> Entry:
    """A dense weight [out, ...]: `constant`, or normal with standard deviation 1/sqrt(fan-in) (a vector: BIAS_STD)."""
    std = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else BIAS_STD

    def make(generator: torch.Generator) -> Tensor:
        tensor = torch.empty(shape, dtype=recipe.torch_dtype)
        return tensor.fill_(constant) if constant is not None else tensor.normal_(0, std, generator=generator)

    return Entry(name, shape, recipe.torch_dtype, make)


def _compressed_tensors(module: str, n: int, k: int, recipe: Recipe) -> Iterator[Entry]:
    """`pack-quantized`: nibbles along K, zero points packed along N, values and zero points offset by 8."""
    groups = _groups(module, k, recipe)
    yield _values(f"{module}.weight_packed", (n, -(-k // 8)), recipe)
    yield _scales(f"{module}.weight_scale", (n, groups), k, recipe)
    yield Entry(f"{module}.weight_shape", (2,), torch.int64, lambda _: torch.tensor([n, k]))
    if not recipe.symmetric:
        yield _zeros(f"{module}.weight_zero_point", (-(-n // 8), groups), recipe)


def _gptq(module: str, n: int, k: int, recipe: Recipe) -> Iterator[Entry]:
    """GPTQ v1: [K / 8, N] nibbles along K, zero points along N stored less 1, an (ordered) g_idx."""
    groups = _groups(module, k, recipe)
    _need_multiple_of_8(module, n, k, recipe)
    yield _values(f"{module}.qweight", (k // 8, n), recipe)
    yield _zeros(f"{module}.qzeros", (groups, n // 8), recipe, offset=-1)
    yield _scales(f"{module}.scales", (groups, n), k, recipe)
    yield Entry(f"{module}.g_idx", (k,), torch.int32, lambda _: torch.arange(k, dtype=torch.int32) // (k // groups))


def _awq(module: str, n: int, k: int, recipe: Recipe) -> Iterator[Entry]:
    """AWQ gemm: [K, N / 8] nibbles along N. Its interleaved order means nothing for random values."""
    groups = _groups(module, k, recipe)
    _need_multiple_of_8(module, n, k, recipe)
    yield _values(f"{module}.qweight", (k, n // 8), recipe)
    yield _zeros(f"{module}.qzeros", (groups, n // 8), recipe)
    yield _scales(f"{module}.scales", (groups, n), k, recipe)


FORMATS: dict[str, Packer] = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}


def quantization_config(recipe: Recipe, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. ignored: names (parts of module names) of what stays dense."""
    if recipe.format == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": recipe.group_size,
            "desc_act": False,
            "sym": recipe.symmetric,
            "checkpoint_format": "gptq",
            "lm_head": False,
            "dynamic": {f"-:{_ignore_rule(name).removeprefix('re:')}": {} for name in ignored if name != "lm_head"},
        }
    if recipe.format == "awq":
        config = {"quant_method": "awq", "bits": 4, "group_size": recipe.group_size, "zero_point": True, "version": "gemm"}
        return {**config, "modules_to_not_convert": ignored}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": recipe.symmetric,
        "strategy": "channel" if recipe.group_size == -1 else "group",
        "group_size": None if recipe.group_size == -1 else recipe.group_size,
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [_ignore_rule(name) for name in ignored],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _ignore_rule(name: str) -> str:
    if name == "lm_head":
        return name
    # "mlp.gate" is the router; with a free end it would take mlp.gate_proj along
    return f"re:.*{name}$" if "." in name else f"re:.*{name}.*"


def _groups(module: str, k: int, recipe: Recipe) -> int:
    if recipe.group_size == -1:
        return 1
    if k % recipe.group_size:
        fits = ", ".join(str(g) for g in GROUP_SIZES if k % g == 0)
        raise ConfigError(f"{module} has {k} input features, no multiple of group size {recipe.group_size} (fit: {fits})")
    return k // recipe.group_size


def _need_multiple_of_8(module: str, n: int, k: int, recipe: Recipe) -> None:
    if n % 8 or k % 8:
        raise ConfigError(f"{module} is [{n}, {k}]: {recipe.format} packs 8 values in a word, both must be multiples of 8")


def _values(name: str, shape: Shape, recipe: Recipe) -> Entry:
    """Words of eight random 4-bit values: 0..15, and for symmetric weights -7..7 with twice as many zeros.

    Uniform -8..7 has mean -1/2: the matrix would hold a rank-one part that outweighs all else from K of about 400 on,
    and every token of a deep model would end in the same state.
    """

    def make(generator: torch.Generator) -> Tensor:
        words = torch.empty(shape, dtype=torch.int32)
        for part in torch.split(words.view(-1), _CHUNK):
            part.random_(-(1 << 31), 1 << 31, generator=generator)
            if recipe.symmetric:
                bit = part >> 1
                bit |= part
                bit |= bit >> 2
                bit &= _LOW_BITS  # 1 where the nibble is not 0
                bit ^= _LOW_BITS
                part |= bit << 3  # 0 (that is -8) becomes 8 (that is 0)
        return words

    return Entry(name, shape, torch.int32, make)


def _zeros(name: str, shape: Shape, recipe: Recipe, offset: int = 0) -> Entry:
    """Words of eight zero points: 8, or for asymmetric weights 6..9 (mean 7.5, that of the values), plus `offset`."""

    def make(generator: torch.Generator) -> Tensor:
        words = torch.empty(shape, dtype=torch.int32)
        if recipe.symmetric:
            return words.fill_(_as_int32((8 + offset) * _LOW_BITS))
        words.random_(-(1 << 31), 1 << 31, generator=generator)
        words &= 3 * _LOW_BITS
        words += (6 + offset) * _LOW_BITS  # at most 9 a nibble: nothing carries, the sign bit may flip
        return words

    return Entry(name, shape, torch.int32, make)


def _scales(name: str, shape: Shape, fan_in: int, recipe: Recipe) -> Entry:
    """Scales, each its own (within 3 to 1, so that a mixed-up group shows), for weights of deviation 1/sqrt(fan_in)."""
    # Mean square of the values: 17.5 for -7..7 with two zeros; 255/12 + 15/12 for uniform less zero points of 6..9.
    values = 17.5 if recipe.symmetric else 22.5
    mean_square = 1 + 1 / 12  # of the uniform factor 0.5..1.5
    scale = (values * mean_square * fan_in) ** -0.5

    def make(generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator).add_(0.5).mul_(scale).to(recipe.torch_dtype)

    return Entry(name, shape, recipe.torch_dtype, make)


def _as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
