#!/bin/sh
# The tables of docs/vllm.md, a set at a time, each call under 10 minutes on one GPU (tp2: two): writes its records to $1.
#     benchmarks/vllm_gpu.sh OUT.json 8b|32b|70b|marlin|humming|moe|fp8|tp2|life
# Wants vLLM and an installed twinweight. No network, no weights: load_format="dummy" models of true size.
set -eu
cd "$(dirname "$0")/.."
OUT=$1
both() { # model, part of the grid, further arguments
    model=$1 part=$2
    shift 2
    for mode in off on; do
        python3 benchmarks/vllm_gpu.py "$OUT" --model "$model" --mode $mode --part "$part" --repeats 2 "$@"
    done
}
case $2 in
8b) both llama-3.1-8b whole && python3 benchmarks/vllm_gpu.py "$OUT" --model llama-3.1-8b --mode bf16 --part whole --repeats 2 ;;
32b) both qwen3-32b short ;;
70b) both llama-3.3-70b least ;;
marlin | humming) both llama-3.1-8b least --linear-backend "$2" ;;
moe) both qwen3-30b-a3b least ;;
fp8) both llama-3.1-8b least --twin-dtype fp8 ;;
tp2) both llama-3.1-8b least --tp 2 ;;
life) python3 benchmarks/vllm_gpu_life.py "$OUT" ;;
*) sed -n 2,4p "$0" && exit 2 ;;
esac
