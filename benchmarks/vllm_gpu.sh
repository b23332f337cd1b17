#!/bin/sh
# The tables of docs/vllm.md, a set at a time on one GPU (tp2: two), or one server of a set a call: adds its records to $1.
#     benchmarks/vllm_gpu.sh OUT.json 8b|8b-long|32b|32b-long|70b|70b-long|moe|fp8|tp2 [off|on]
#     benchmarks/vllm_gpu.sh OUT.json 8b-marlin|8b-humming|32b-marlin|32b-humming|70b-marlin|70b-humming [off|on]
#     benchmarks/vllm_gpu.sh OUT.json 32b-marlin-more|70b-marlin-more [off|on]
#     benchmarks/vllm_gpu.sh OUT.json 8b-bf16|32b-bf16|life
# -more: 32 and 64 requests at once. -long: prompts of 8192 tokens, of which the largest models get fewer at once: 64 take
# llama-3.3-70b two minutes, 128 four.
# Wants vLLM and an installed twinweight. No network, no weights: load_format="dummy" models of true size.
set -eu
cd "$(dirname "$0")/.."
OUT=$1 MODES=${3:-off on}
both() { # model, part of the grid, further arguments
    model=$1 part=$2
    shift 2
    for mode in $MODES; do
        python3 benchmarks/vllm_gpu.py "$OUT" --model "$model" --mode "$mode" --part "$part" --repeats 2 "$@"
    done
}
case $2 in
8b*) model=llama-3.1-8b ;;
32b*) model=qwen3-32b ;;
70b*) model=llama-3.3-70b ;;
esac
case $2 in
8b) both $model whole --prompts 512 2048 ;;
8b-long) both $model whole --prompts 8192 ;;
32b | 70b) both $model whole --repeats 1 --prompts 512 2048 ;;
32b-long) both $model whole --repeats 1 --prompts 8192 --concurrency 1 8 32 64 ;;
70b-long) both $model whole --repeats 1 --prompts 8192 --concurrency 1 8 32 ;;
8b-marlin | 8b-humming) both $model whole --linear-backend "${2#*-}" ;;
32b-marlin | 32b-humming | 70b-marlin | 70b-humming)
    both $model whole --repeats 1 --concurrency 1 8 --linear-backend "${2#*-}"
    ;;
32b-marlin-more | 70b-marlin-more)
    both $model whole --repeats 1 --prompts 512 2048 --concurrency 32 64 --linear-backend marlin
    ;;
moe) both qwen3-30b-a3b least ;;
fp8) both llama-3.1-8b least --twin-dtype fp8 ;;
tp2) both llama-3.1-8b least --tp 2 ;;
8b-bf16) MODES=bf16 && both $model whole ;;
32b-bf16) MODES=bf16 && both $model whole --repeats 1 --prompts 512 2048 ;;
life) python3 benchmarks/vllm_gpu_life.py "$OUT" ;;
*) sed -n 2,9p "$0" && exit 2 ;;
esac
