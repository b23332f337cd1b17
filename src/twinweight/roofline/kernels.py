"""What a GPU kernel is, by its name alone: all that is left where a CUDA graph replays it and no op launched it."""

from __future__ import annotations

import functools
import re

from twinweight.roofline.ops import kind_of

_RULES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|rccl|all_?reduce|all_?gather|reduce_scatter|cross_device|multimem"),
    ("moe", r"moe|fused_experts|grouped_gemm|grouped_mm|topk_softmax|topkGating|expert"),
    ("copy", r"reshape_and_cache|concat_and_cache|kv_cache_scatter"),
    ("sampling", r"gumbel|argmax|multinomial|topk|top_k|top_p|radix|bitonic|sort|sampl|penalt|Sampling|gatherTopK|ArgMax"),
    (
        "w4a16",
        r"machete|marlin|humming|wvSplitK_int4|w4a16|int4|awq|gptq|exllama|wna16|tinygemm|_dot_kernel|_decode_kernel|"
        r"gemm_half_q_half|reconstruct",
    ),
    (
        "attention",
        r"flash|fmha|FlashAttn|attention|paged_attn|mha_|_attn_|attn_fwd|BatchPrefill|BatchDecode|fwd_splitkv|"
        r"prepare_varlen|cascade|merge_attn",
    ),
    ("elementwise", r"rotary|act_and_mul|rope_kernel"),
    ("norm", r"rms_?norm|layer_?norm|LayerNorm|RMSNorm|group_norm|norm_kernel"),
    ("embedding", r"embedding|indexSelect(Small|Large)Index|vectorized_gather_kernel"),
    (
        "gemm",
        r"nvjet|gemm|Gemm|GEMM|gemv|cublas|splitKreduce|Cijk_|xmma|wmma|cutlass_\d|_mm_kernel|dot_kernel|hipblas|rocblas|"
        r"wvSplitK|LLGemm|LLMM1|matmul|_scaled_mm|ampere_.*(s|h)(16|88)|sm\d+_xmma|conv|implicit_convolve|cudnn",
    ),
    (
        "copy",
        r"[Mm]emcpy|[Mm]emset|copyBuffer|fillBuffer|Copy(Host|Device)To|CatArray|direct_copy|copy_kernel|FillFunctor|index_kernel|"
        r"index_elementwise|scatter_gather|index_put|transpose|elementwise_kernel_with_index|arange|memcpy\d|"
        r"slot_mapping|block_table|_apply_write|_prepare_|_post_update|_combine_sampled|_get_num_|tensor_kernel_scan|"
        r"masked_fill|cumsum|expand_kernel|contiguous",
    ),
    (
        "elementwise",
        r"elementwise|reduce_kernel|silu|gelu|softmax|Softmax|_quant|scaled_fp8|pointwise|activation|swiglu|_(rows|groups)_kernel",
    ),
)
_COMPILED = tuple((kind, re.compile(rule)) for kind, rule in _RULES)

# What is worth a name of its own among names of a thousand characters.
_SHORT = (
    (re.compile(r"machete::"), "machete"),
    (re.compile(r"marlin::|marlin_moe|\bMarlin\b|marlin"), "marlin"),
    (re.compile(r"flash::FlashAttnFwdCombine"), "flash attention (combine)"),
    (re.compile(r"flash::FlashAttnFwdSm90|flash_fwd_splitkv|flash::.*flash_fwd|flash_fwd_kernel"), "flash attention"),
    (re.compile(r"splitKreduce_kernel"), "cublasLt::splitKreduce_kernel"),
)
_ANONYMOUS = re.compile(r"\(anonymous namespace\)::|<unnamed>::")
_RETURN = re.compile(r"^(?:void|std::enable_if<.*>::type)\s+")
# Inductor also names the opaque op that reads what it fused, which differs between off and on, and numbers its kernels.
_READER = re.compile(r"_(vllm_linear|machete_mm|(gptq_)?marlin_gemm|cpu_gemm_wna16)(?=_|$)")
_NUMBERED = re.compile(r"_\d+$")


@functools.lru_cache(maxsize=65536)
def kind_of_kernel(name: str) -> str | None:
    """One of `ops.KINDS`, or None for a kernel that no rule knows."""
    if name.startswith("triton_"):
        return kind_of(name)
    return next((kind for kind, rule in _COMPILED if rule.search(name)), None)


@functools.lru_cache(maxsize=65536)
def short(name: str) -> str:
    """The name without return type, template arguments and parameters; Inductor's without its number and reader."""
    for rule, text in _SHORT:
        if rule.search(name):
            return text
    if name.startswith("triton_"):
        return _READER.sub("", _NUMBERED.sub("", name))
    plain = _ANONYMOUS.sub("", _RETURN.sub("", name))
    plain = re.split(r"[<(]", plain, maxsplit=1)[0].strip()
    if functor := re.search(r"(\w+Functor|\w+_kernel_cuda|ArgMaxOps|\w+_kernel_impl)", name.removeprefix(plain)):
        plain += f" [{functor[1]}]"
    return plain[:120] or name[:120]
