#!/bin/sh
# The tables of docs/vllm.md and docs/vllm-measured.md, a set a call: adds its records to OUT.json.
#     benchmarks/vllm_gpu.sh OUT.json 8b|32b|70b[-marlin|-humming] [few|wide|long] [off|on|bf16]
#     benchmarks/vllm_gpu.sh OUT.json moe|fp8|tp2 [off|on]
#     benchmarks/vllm_gpu.sh OUT.json life
# few: what the first table shows; wide: 8, 64 and 128 requests; long: prompts of 8192 tokens. A server takes one to four minutes, of
# 70b up to eight where it is wide or long: give a mode where a call may not take longer.
# Wants vLLM and an installed twinweight, one GPU (tp2: two), no network and no weights: load_format="dummy" models of true size.
set -eu
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n 2,8p "$0" && exit 2; }
OUT=$1 SET=$2
shift 2
few="512x1 512x32 512x64 2048x1 2048x32"
case ${1:-} in
few) points=$few ;;
wide) points="512x8 512x128 2048x8 2048x64 2048x128" ;;
long) points="8192x1 8192x8 8192x32" ;;
*) points=$few && set -- few "$@" ;;
esac
modes=${2:-off on}
served() { # model, further arguments
    model=$1
    shift
    for mode in $modes; do
        # shellcheck disable=SC2086  # several points
        python3 benchmarks/vllm_gpu.py "$OUT" --model "$model" --mode "$mode" --points $points "$@"
    done
}
case $SET in
*-marlin) backend=marlin ;;
*-humming) backend=humming ;;
*) backend=auto ;;
esac
case $SET in
8b | 8b-marlin | 8b-humming) served llama-3.1-8b --linear-backend $backend --repeats 2 ;;
32b | 32b-marlin | 32b-humming) served qwen3-32b --linear-backend $backend --repeats 1 ;;
70b | 70b-marlin | 70b-humming) served llama-3.3-70b --linear-backend $backend --repeats 1 ;;
moe) served qwen3-30b-a3b --repeats 2 ;;
fp8) served llama-3.1-8b --twin-dtype fp8 --repeats 2 ;;
tp2) served llama-3.1-8b --tp 2 --repeats 2 ;;
life) python3 benchmarks/vllm_gpu_life.py "$OUT" ;;
*) sed -n 2,8p "$0" && exit 2 ;;
esac
