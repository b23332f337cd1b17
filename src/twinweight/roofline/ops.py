"""What kind of work an op does, by its name."""

from __future__ import annotations

import functools
import re

KINDS = (
    "gemm", "w4a16", "attention", "moe", "norm", "elementwise", "copy", "embedding", "sampling", "communication", "other",
)  # fmt: skip

SEALED = frozenset(("attention", "moe", "norm", "embedding", "sampling", "communication"))
"""Kinds whose outermost op owns all that happens inside it."""

LINEAR = frozenset(("gemm", "w4a16"))

VIEW = "view"
"""Ops that move nothing; they are reported as `other`."""

_RULES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|c10d::|all_?reduce|all_?gather|reduce_scatter|broadcast_$|all_?to_?all|_send$|_recv$"),
    ("moe", r"moe|fused_experts|grouped_mm|grouped_gemm|topk_softmax|topk_sigmoid"),
    ("copy", r"kv_cache_update|reshape_and_cache|concat_and_cache|_C_cache_ops::|slot_mapping"),
    (
        "attention",
        r"attention|get_scheduler_metadata|flash_attn|_vllm_fa\d_C::|fmha|paged_attn|unified_mla|"
        r"flashinfer.*(prefill|decode)",
    ),
    (
        "w4a16",
        r"twinweight::(vllm_)?linear|int4|w4a16|machete_mm|marlin_gemm|marlin_qqq|gptq_gemm|awq_(gemm|triton)|wna16|"
        r"allspark_w8a16|humming",
    ),
    ("sampling", r"argmax|multinomial|aten::topk|aten::sort|aten::exponential_|sampl|top_k|top_p|gumbel|penalt"),
    ("elementwise", r"rotary|silu_and_mul|gelu_and_mul|act_and_mul|_and_mul$|rope"),
    ("norm", r"rms_norm|layer_norm|group_norm|batch_norm|l2_?norm|::norm$|_norm$"),
    ("embedding", r"embedding"),
    (
        "gemm",
        r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|addmv|mv|dot|einsum|_scaled_mm|_int_mm|_addmm_activation|inner|tensordot|"
        r"_?convolution|_?conv[123]d|mkldnn_convolution|cudnn_convolution|miopen_convolution|convolution_overrideable|"
        r"thnn_conv2d|_slow_conv2d_forward|slow_conv3d|mkldnn_linear)|^mkldnn::_linear|^mkldnn::_convolution|scaled_mm|"
        r"unquantized_gemm|wvSplitK|LLMM1|hipb_mm|^mkl::_mkl_linear|onednn::.*linear|onednn_(scaled_)?mm|dynamic_4bit_matmul",
    ),
    (
        VIEW,
        r"^aten::(view|reshape|as_strided|slice|select|narrow|transpose|t|permute|expand|expand_as|unsqueeze|squeeze|split|"
        r"split_with_sizes|chunk|unbind|alias|detach|detach_|lift_fresh|resolve_conj|resolve_neg|empty|empty_like|"
        r"empty_strided|new_empty|new_empty_strided|resize_|set_|result_type|_reshape_alias|_unsafe_view|view_as|flatten|"
        r"unflatten|item|_local_scalar_dense|is_nonzero|is_pinned|pin_memory|_pin_memory|size|stride|numel|diagonal|real|"
        r"broadcast_tensors|movedim|swapaxes|mT|contiguous|data|requires_grad_|unfold)$",
    ),
    (
        "copy",
        r"^aten::(copy_|to|_to_copy|clone|cat|_cat|stack|index|index_select|index_copy_?|index_put_?|_index_put_impl_|gather|"
        r"scatter_?|scatter_add_?|repeat|repeat_interleave|fill_|zero_|zeros|zeros_like|ones|ones_like|full|full_like|new_ones|"
        r"new_zeros|new_full|arange|tril|triu|roll|flip|pad|constant_pad_nd|take|masked_fill_?|_copy_from|slice_copy|tensor|"
        r"scalar_tensor|masked_scatter_?|nonzero|eye|linspace|_index_put)|[Mm]emcpy|[Mm]emset|swap_blocks",
    ),
    ("elementwise", r"^aten::|^triton_(poi|per|red)_|^_C::.*(silu|gelu|mul|quant)"),
)  # fmt: skip
_COMPILED = tuple((kind, re.compile(rule)) for kind, rule in _RULES)
_WORDS = (("norm", r"_(rms|layer)_?norm"), ("embedding", r"_embedding"), ("gemm", r"^triton_tem_"))


@functools.lru_cache(maxsize=65536)
def kind_of(name: str) -> str:
    """One of `KINDS`, or `VIEW`, for an op's name ("aten::mm", "_C::machete_mm", "triton_red_fused_rms_norm_0")."""
    if name.startswith("triton_"):  # Inductor's kernels name the ops they fuse
        return next((kind for kind, rule in _WORDS if re.search(rule, name)), "elementwise")
    return next((kind for kind, rule in _COMPILED if rule.search(name)), "other")


@functools.lru_cache(maxsize=65536)
def takes_inputs(name: str) -> bool:
    """Whether the inputs of such an op tell something: not those of views, which are half of a trace."""
    return kind_of(name) != VIEW
