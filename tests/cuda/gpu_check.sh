#!/bin/sh
# gpu_check.sh - everything that only a GPU can prove, each step under ten minutes. `make gpu-check`.
# Prints a line per step and writes them to bench/results/gpu_check.txt; exit 1 if a step failed.
set -u
cd "$(dirname "$0")/../.." || exit 1
mkdir -p bench/results
out=bench/results/gpu_check.txt
failed=0
: >"$out"
say() { echo "$*" | tee -a "$out"; }

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    rm -f "$out"
    echo "skipped: no GPU"
    exit 0
fi
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | head -n 1)"
say "commit $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"

step() { # NAME COMMAND...
    name=$1
    shift
    start=$(date +%s)
    log=$(mktemp)
    if timeout 600 "$@" >"$log" 2>&1; then result=ok; else result=FAILED failed=1; fi
    say "$(printf '%-28s %-7s %4d s  %s' "$name" "$result" $(($(date +%s) - start)) "$(tail -n 1 "$log")")"
    [ $result = ok ] || cat "$log"
    rm -f "$log"
}

step "CUDA tests" build/cuda/test_cuda
step "program against the CPU's" tests/cuda/test_cuda_program.py ./qemb-cuda build/release/qemb
if command -v compute-sanitizer >/dev/null; then
    small="ptx attention_ rmsnorm qknorm swiglu gate_up quantize op_matmul op_attention op_embed_back op_fp8 forward_shapes same_bits"
    for tool in memcheck racecheck synccheck initcheck; do
        # shellcheck disable=SC2086
        step "compute-sanitizer $tool" compute-sanitizer --tool $tool --error-exitcode 9 build/cuda/test_cuda $small
    done
else
    say "skipped: compute-sanitizer is not installed"
fi
# The slowest of our own kernels, as the profiler sees it; where it may not look, that is no failure.
if command -v ncu >/dev/null; then
    if ncu --clock-control none --kernel-name regex:attention --launch-count 1 --section SpeedOfLight \
        build/cuda/bench_cuda >bench/results/ncu_attention.txt 2>&1; then
        say "ncu: bench/results/ncu_attention.txt"
    else
        say "skipped: ncu ($(tail -n 1 bench/results/ncu_attention.txt))"
    fi
else
    say "skipped: ncu is not installed"
fi
exit $failed
