#!/bin/sh
# The 8B shape cut to 2 layers through vLLM for CPUs, 1024 tokens in: writes benchmarks/results/cpu/vllm-llama-3.1-8b-2l.json, or $1.
# Wants the environment of `make test-vllm`, 2 cores (CORES), and an idle machine.
set -eu
cd "$(dirname "$0")/.."
MODEL=build/llama-3.1-8b-2l
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND="${CORES:-0-1}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP=127.0.0.1
[ -f $MODEL/config.json ] || .venv-vllm/bin/twinweight synth $MODEL --like llama-3.1-8b --layers 2
.venv-vllm/bin/twinweight bench $MODEL --engine vllm --prompt-tokens 1024 --concurrency 1 --output-tokens 32 --repeats 3 --rounds 2 \
    --json "${1:-benchmarks/results/cpu/vllm-llama-3.1-8b-2l.json}"
