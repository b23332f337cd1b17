"""Names to kinds: of ops, and of kernels where the name is all there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import twinweight.kernels
from twinweight.roofline.kernels import kind_of_kernel, short
from twinweight.roofline.ops import KINDS, VIEW, kind_of, takes_inputs

OPS = [
    ("aten::mm", "gemm"), ("aten::addmm", "gemm"), ("aten::bmm", "gemm"), ("aten::linear", "gemm"), ("aten::matmul", "gemm"),
    ("aten::_scaled_mm", "gemm"), ("aten::_int_mm", "gemm"), ("aten::convolution", "gemm"), ("aten::conv2d", "gemm"),
    ("mkldnn::_linear_pointwise", "gemm"), ("_C::cutlass_scaled_mm", "gemm"), ("_rocm_C::wvSplitK", "gemm"),
    ("vllm::rocm_unquantized_gemm", "gemm"),
    ("twinweight::linear", "w4a16"), ("twinweight::vllm_linear", "w4a16"), ("_C::machete_mm", "w4a16"),
    ("_C::gptq_marlin_gemm", "w4a16"), ("_C::marlin_gemm", "w4a16"), ("_C::cpu_gemm_wna16", "w4a16"),
    ("_C::onednn_mm", "gemm"), ("_C::get_scheduler_metadata", "attention"),
    ("aten::_weight_int4pack_mm", "w4a16"), ("aten::_weight_int4pack_mm_for_cpu", "w4a16"),
    ("_rocm_C::wvSplitK_int4_g", "w4a16"), ("_C::awq_gemm", "w4a16"), ("_C::gptq_gemm", "w4a16"),
    ("vllm::hybrid_w4a16_apply", "w4a16"), ("vllm::humming_gemm", "w4a16"),
    ("aten::scaled_dot_product_attention", "attention"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ("vllm::unified_attention_with_output", "attention"), ("_vllm_fa3_C::fwd", "attention"),
    ("_vllm_fa2_C::varlen_fwd", "attention"), ("flash_attn::_flash_attn_forward", "attention"),
    ("vllm::moe_forward", "moe"), ("vllm::outplace_fused_experts", "moe"), ("_moe_C::topk_softmax", "moe"),
    ("aten::_grouped_mm", "moe"), ("_moe_C::moe_align_block_size", "moe"),
    ("_C::rms_norm", "norm"), ("_C::fused_add_rms_norm", "norm"), ("aten::layer_norm", "norm"),
    ("aten::_fused_rms_norm", "norm"), ("aten::native_layer_norm", "norm"),
    ("aten::embedding", "embedding"), ("_C::rotary_embedding", "elementwise"), ("_C::silu_and_mul", "elementwise"),
    ("aten::mul", "elementwise"), ("aten::add_", "elementwise"), ("aten::silu", "elementwise"), ("aten::mean", "elementwise"),
    ("aten::copy_", "copy"), ("aten::to", "copy"), ("aten::cat", "copy"), ("aten::index_select", "copy"),
    ("vllm::unified_kv_cache_update", "copy"), ("_C_cache_ops::reshape_and_cache_flash", "copy"),
    ("aten::argmax", "sampling"), ("aten::multinomial", "sampling"), ("aten::topk", "sampling"),
    ("c10d::allreduce_", "communication"), ("vllm::all_reduce", "communication"), ("nccl:all_reduce", "communication"),
    ("triton_poi_fused_mul_silu_slice_vllm_linear_1", "elementwise"),
    ("triton_red_fused_fused_add_rms_norm_vllm_linear_2", "norm"),
    ("triton_poi_fused_embedding_0", "embedding"), ("triton_tem_fused_addmm_3", "gemm"),
    ("aten::view", VIEW), ("aten::as_strided", VIEW), ("aten::t", VIEW), ("aten::transpose", VIEW), ("aten::slice", VIEW),
    ("Pregraph bytecode", "other"), ("my_library::my_op", "other"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), OPS)
def test_ops(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert kind in (*KINDS, VIEW)
    assert takes_inputs(name) == (kind != VIEW)


def test_every_kernel_of_ours_is_known() -> None:
    sources = (Path(twinweight.kernels.__file__).parent).glob("*.py")
    names = {name for file in sources for name in re.findall(r"^def (\w*_kernel)\(", file.read_text(), re.M)}
    assert {name: kind_of_kernel(name) for name in names} == {
        "_dot_kernel": "w4a16", "ampere_dot_kernel": "w4a16", "hopper_dot_kernel": "w4a16",
        "hopper_few_dot_kernel": "w4a16", "_expand_kernel": "copy",
        "_rows_kernel": "elementwise", "_groups_kernel": "elementwise", "_grid_kernel": None,  # makes a twin, once
        "_read_back_kernel": None,  # makes a copy, once
    }  # fmt: skip


KERNELS = [
    ("void cutlass::device_kernel<cutlass::gemm::Universal<machete::MacheteCollectiveMma<>>>(int)", "w4a16", "machete"),
    ("void marlin::Marlin<__nv_bfloat16, 256, 1, 8>(int4 const*)", "w4a16", "marlin"),
    ("void gptq_marlin_repack_kernel<256>(uint const*)", "w4a16", "marlin"),
    ("humming_gemm_w4a16_kernel", "w4a16", "humming_gemm_w4a16_kernel"),
    ("_triton_w4a16_skinny_fmt_kernel", "w4a16", "_triton_w4a16_skinny_fmt_kernel"),
    ("void wvSplitK_int4_g_hf_sml_<__hip_bfloat16, 64>(int)", "w4a16", "wvSplitK_int4_g_hf_sml_"),
    ("void wvSplitK_hf_sml_<__hip_bfloat16, 64>(int)", "gemm", "wvSplitK_hf_sml_"),
    ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "gemm", "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(int)", "gemm", "cutlass::Kernel2"),
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn", "gemm", None),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(int)", "gemm", "cublasLt::splitKreduce_kernel"),
    ("Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT128x128x32", "gemm", None),
    ("void cutlass::device_kernel<flash::enable<flash::FlashAttnFwdSm90<>>>(int)", "attention", "flash attention"),
    ("void cutlass::device_kernel<flash::FlashAttnFwdCombine<>>(int)", "attention", "flash attention (combine)"),
    ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>(int)", "attention", "flash attention"),
    ("kernel_unified_attention_2d", "attention", "kernel_unified_attention_2d"),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention", None),
    ("triton_red_fused_fused_add_rms_norm_vllm_linear_2", "norm", "triton_red_fused_fused_add_rms_norm"),
    ("triton_poi_fused_machete_mm_mul_silu_slice_1", "elementwise", "triton_poi_fused_mul_silu_slice"),
    ("triton_poi_fused_5", "elementwise", "triton_poi_fused"),
    ("std::enable_if<(((8)>(0))), void>::type vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(int)", "norm",
     "vllm::fused_add_rms_norm_kernel"),
    ("void vllm::act_and_mul_kernel<c10::BFloat16>(int)", "elementwise", "vllm::act_and_mul_kernel"),
    ("void vllm::rotary_embedding_kernel<c10::BFloat16>(int)", "elementwise", "vllm::rotary_embedding_kernel"),
    ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>(int)", "copy", "vllm::reshape_and_cache_flash_kernel"),
    ("void at::native::(anonymous namespace)::indexSelectSmallIndex<long>(int)", "embedding",
     "at::native::indexSelectSmallIndex"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>(int)", "sampling",
     "at::native::reduce_kernel [ArgMaxOps]"),
    ("_gumbel_sample_kernel", "sampling", "_gumbel_sample_kernel"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>(int)", "copy", None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)", "elementwise", None),
    ("Memcpy HtoD (Pinned -> Device)", "copy", "Memcpy HtoD"),
    ("Memset (Device)", "copy", "Memset"),
    ("CopyDeviceToDevice", "copy", "CopyDeviceToDevice"),
    ("__amd_rocclr_copyBuffer", "copy", "__amd_rocclr_copyBuffer"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication", None),
    ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(int)", "communication", None),
    ("fused_moe_kernel", "moe", "fused_moe_kernel"),
    ("void vllm::moe::topkGating<8, 64>(float const*)", "moe", "vllm::moe::topkGating"),
    ("somebodys_kernel_v2", None, "somebodys_kernel_v2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "shown"), KERNELS)
def test_kernels(name: str, kind: str | None, shown: str | None) -> None:
    assert kind_of_kernel(name) == kind
    if shown is not None:
        assert short(name) == shown
    assert len(short(name)) <= 120
