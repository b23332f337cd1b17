#!/bin/sh
# The 8B shape cut to 2 layers through vLLM for CPUs, 1024 tokens in, with dense twins and with int8 ones: writes
# vllm-llama-3.1-8b-2l.json and vllm-llama-3.1-8b-2l-int8.json in benchmarks/results/cpu, or in $1, and where the CPU has AMX
# vllm-llama-3.1-8b-2l-w4a8.json. Wants the environment of `make test-vllm`, 2 cores (CORES), and an idle machine. tcmalloc is
# preloaded where it is installed (apt install libtcmalloc-minimal4), off and on, as vLLM's installation guide for CPUs asks.
set -eu
case ${1:-} in -*) sed -n 2,5p "$0" && exit 2 ;; esac
cd "$(dirname "$0")/.."
MODEL=build/llama-3.1-8b-2l
OUT=${1:-benchmarks/results/cpu}
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_INT4_W4A8=0 VLLM_CPU_OMP_THREADS_BIND="${CORES:-0-1}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP=127.0.0.1
[ -f $MODEL/config.json ] || .venv-vllm/bin/twinweight synth $MODEL --like llama-3.1-8b --layers 2
PRELOAD=$(ldconfig -p | sed -n 's/.* => \(.*libtcmalloc_minimal\.so.*\)/\1/p' | head -n 1)
bench() { # name, kind of twin
    env ${PRELOAD:+LD_PRELOAD="$PRELOAD"} .venv-vllm/bin/twinweight bench $MODEL --engine vllm --prompt-tokens 1024 --concurrency 1 \
        --output-tokens 32 --repeats 5 --rounds 3 --twin-dtype "$2" --json "$OUT/$1.json"
}
bench vllm-llama-3.1-8b-2l dense
bench vllm-llama-3.1-8b-2l-int8 int8
# vLLM's default on CPUs with AMX, which Twinweight leaves alone: int8 activations.
if grep -q amx_int8 /proc/cpuinfo; then
    export VLLM_CPU_INT4_W4A8=1
    bench vllm-llama-3.1-8b-2l-w4a8 dense
fi
