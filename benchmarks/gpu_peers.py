"""The int4 products of others, for `gpu_paths.py`: ATen's, GemLite's, QuACK's, and vLLM's Marlin, Machete and humming, each
where its library is installed.

Each function takes an `Int4Weight` on the GPU (plain column order, no act-order) and returns x -> y, or raises what it meets;
`available` catches that and says which peer is missing, and why.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinweight.weight import Int4Weight, pack_nibbles

Linear = Callable[[Tensor], Tensor]
BF16_ONLY = ("tinygemm", "quack")


def tinygemm(w: Int4Weight, dtype: torch.dtype) -> Linear:
    """`aten::_weight_int4pack_mm`, bf16 only."""
    if dtype != torch.bfloat16:
        raise TypeError("bf16 only")
    values = w.values()
    packed = torch.ops.aten._convert_weight_to_int4pack((values[:, ::2] << 4 | values[:, 1::2]).contiguous(), 8)
    zeros = w.zeros.float() if w.zeros is not None else torch.full_like(w.scales, 8, dtype=torch.float32)
    # it computes (q - 8) * s + z
    scale_zero = torch.stack((w.scales.float(), (8 - zeros) * w.scales.float()), -1).to(dtype).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, w.group_size, scale_zero)


def machete(w: Int4Weight, dtype: torch.dtype) -> Linear:
    """vLLM's Machete (Hopper)."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8 if w.zeros is None else scalar_types.uint4
    weight = ops.machete_prepack_B(w.packed.t(), a_type=dtype, b_type=kind, group_scales_type=dtype)
    scales = w.scales.to(dtype).t().contiguous()
    zeros = (-1.0 * scales * w.zeros.t().to(dtype)).contiguous() if w.zeros is not None else None
    size = w.group_size
    return lambda x: ops.machete_mm(a=x, b_q=weight, b_type=kind, b_group_zeros=zeros, b_group_scales=scales, b_group_size=size)


def marlin(w: Int4Weight, dtype: torch.dtype) -> Linear:
    """vLLM's Marlin."""
    import vllm.model_executor.layers.quantization.utils.marlin_utils as utils
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    n, k = w.shape
    kind = scalar_types.uint4b8 if w.zeros is None else scalar_types.uint4
    device = w.packed.device
    none = utils.marlin_make_empty_g_idx(device)
    weight = ops.gptq_marlin_repack(w.packed.t().contiguous(), perm=none, size_k=k, size_n=n, num_bits=4)
    scales = utils.marlin_permute_scales(w.scales.to(dtype).t().contiguous(), size_k=k, size_n=n, group_size=w.group_size)
    zeros = none
    if w.zeros is not None:
        zeros = utils.marlin_zero_points(
            w.zeros.t().to(torch.int32).contiguous(), size_k=k // w.group_size, size_n=n, num_bits=4
        )
    workspace = utils.marlin_make_workspace_new(device)

    def run(x: Tensor) -> Tensor:
        return utils.apply_gptq_marlin_linear(  # type: ignore[no-any-return]
            input=x, weight=weight, weight_scale=scales, weight_zp=zeros, g_idx=none, g_idx_sort_indices=none,
            workspace=workspace, wtype=kind, output_size_per_partition=n, input_size_per_partition=k, is_k_full=True,
        )  # fmt: skip

    return run


def humming(w: Int4Weight, dtype: torch.dtype) -> Linear:
    """vLLM's humming; it compiles a kernel a shape at its first use."""
    from vllm.model_executor.layers.quantization.utils.humming_utils import (
        convert_linear_layer_to_humming_standard,
        prepare_humming_layer,
    )
    from vllm.utils.humming import HummingMethod

    n, k = w.shape
    layer: Any = torch.nn.Module()
    layer.weight_packed = torch.nn.Parameter(w.packed.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(w.scales.to(dtype).clone(), requires_grad=False)
    names = {"weight": "weight_packed", "weight_scale": "weight_scale"}
    settings = {"quant_method": "humming", "dtype": "int4", "group_size": w.group_size}
    if w.zeros is not None:
        layer.weight_zp = torch.nn.Parameter(pack_nibbles(w.zeros.t()).t().contiguous(), requires_grad=False)
        names["zero_point"] = "weight_zp"
        settings |= {"dtype": "uint4", "has_zero_point": True}
    layer.input_size_per_partition, layer.output_partition_sizes = k, [n]
    layer.params_dtype, layer.has_bias = dtype, False
    convert_linear_layer_to_humming_standard(layer=layer, name_map=names)
    prepare_humming_layer(layer, settings)
    return lambda x: HummingMethod.forward_layer(layer=layer, inputs=x, compute_config=layer.compute_config)


def gemlite(w: Int4Weight, dtype: torch.dtype) -> Linear:
    """GemLite 0.6.0.post2, `GemLiteLinear` (Triton), with the kernel that it chooses for the number of rows.

    Tiles are those it ships for the H100, and where it ships none (2 to 4 rows, 64 rows, shapes of other models) those that its
    own "fast" tuning finds at the first call. Rounding of asymmetric weights is its own: q * s + (-z * s) in `dtype`.
    """
    library = _gemlite()
    n, k = w.shape
    kind = {torch.float16: library.DType.FP16, torch.bfloat16: library.DType.BF16}[dtype]
    layer = library.GemLiteLinear(
        4, group_size=w.group_size, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
    )
    zeros = 8 if w.zeros is None else w.zeros.to(dtype)  # it computes (q - z) * s
    layer.pack(w.values(), w.scales.to(dtype), zeros)
    return lambda x: layer(x)


def quack(w: Int4Weight, dtype: torch.dtype) -> Linear:
    """QuACK's `gemm_w4a16` (Hopper), bf16 only; it compiles a kernel a tile at its first use."""
    if dtype != torch.bfloat16:
        raise TypeError("bf16 only")
    from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight

    values = w.values().to(torch.uint8)
    packed = (values[:, ::2] | values[:, 1::2] << 4).contiguous()
    kind = "int4" if w.zeros is None else "int4awq"
    blob, scales = prepare_w4_weight(packed, w.scales if w.zeros is None else (w.scales, w.zeros), kind)
    return lambda x: gemm_w4a16(x, blob, scales, n_out=w.shape[0], wformat=kind)


@functools.cache
def _gemlite() -> Any:
    """The library, made ready once: it has no tiles under the H200's name, so take the H100's."""
    import gemlite
    from gemlite.core import GEMLITE_TRITON_KERNELS

    gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    for kind in GEMLITE_TRITON_KERNELS:
        for tuner in kind.kernel:
            _compile_together(tuner)
    return gemlite


def _compile_together(tuner: Any) -> None:
    """Let a Triton autotuner (3.6) compile its candidates on all cores before it times them one by one."""
    from triton.runtime._async_compile import AsyncCompileMode

    prune = tuner.prune_configs

    def pruned(kwargs: dict[str, Any]) -> list[Any]:
        configs: list[Any] = prune(kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "warmup"}
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                tuner.fn.warmup(*tuner.nargs.values(), **rest, **config.all_kwargs())
        return configs

    tuner.prune_configs = pruned


PEERS: dict[str, Callable[[Int4Weight, torch.dtype], Linear]] = {
    "tinygemm": tinygemm,
    "marlin": marlin,
    "machete": machete,
    "humming": humming,
    "gemlite": gemlite,
    "quack": quack,
}


def available(weight: Int4Weight, dtype: torch.dtype, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """(peers that compute this weight's product, reasons of the others): each is tried on 16 rows of x against float64."""
    x = torch.randn(16, weight.shape[1], device=weight.packed.device).to(dtype)
    truth = x.double() @ weight.dequantize(dtype).double().t()
    good, reasons = [], {}
    for name in names:
        try:
            y = PEERS[name](weight, dtype)(x)
            error = float((y.double() - truth).norm() / truth.norm())
            if error < 2e-2:
                good.append(name)
            else:
                reasons[name] = f"relative error {error:.3g}"
        except Exception as error:  # whatever a missing or foreign library raises
            reasons[name] = f"{type(error).__name__}: {error}"[:300]
    return good, reasons
