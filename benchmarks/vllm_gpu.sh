#!/bin/sh
# The tables of docs/vllm.md, a set at a time on one GPU (tp2: two), or one server of a set a call: adds its records to $1.
#     benchmarks/vllm_gpu.sh OUT.json 8b|8b-long|32b|32b-long|70b|70b-long|marlin|humming|moe|fp8|tp2 [off|on]
#     benchmarks/vllm_gpu.sh OUT.json 8b-bf16|32b-bf16|life
# -long: prompts of 8192 tokens, of which the largest models get fewer at once: 64 take llama-3.3-70b two minutes, 128 four.
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
8b) both llama-3.1-8b whole --prompts 512 2048 ;;
8b-long) both llama-3.1-8b whole --prompts 8192 ;;
32b) both qwen3-32b whole --repeats 1 --prompts 512 2048 ;;
32b-long) both qwen3-32b whole --repeats 1 --prompts 8192 --concurrency 1 8 32 64 ;;
70b) both llama-3.3-70b whole --repeats 1 --prompts 512 2048 ;;
70b-long) both llama-3.3-70b whole --repeats 1 --prompts 8192 --concurrency 1 8 32 ;;
marlin | humming) both llama-3.1-8b least --linear-backend "$2" ;;
moe) both qwen3-30b-a3b least ;;
fp8) both llama-3.1-8b least --twin-dtype fp8 ;;
tp2) both llama-3.1-8b least --tp 2 ;;
8b-bf16) MODES=bf16 && both llama-3.1-8b whole ;;
32b-bf16) MODES=bf16 && both qwen3-32b whole --repeats 1 --prompts 512 2048 ;;
life) python3 benchmarks/vllm_gpu_life.py "$OUT" ;;
*) sed -n 2,6p "$0" && exit 2 ;;
esac
