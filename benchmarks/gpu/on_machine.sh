#!/usr/bin/env bash
# What needs a GPU, in about four minutes, on a machine with PyTorch and Triton alone: the tests
# first, then the benchmarks in the form that the first argument asks for (--quick, or nothing).
# Logs and results go to $OUT, or to the current folder. What has run before the time is over stays.
set -u
cd "$(dirname "$0")/../.."
out=${OUT:-.}
export PYTHONPATH=.

# The project's pytest options need plugins that are not there.
run_tests() {
    timeout 60 python3 -m pytest -q -c /dev/null --rootdir=. --import-mode=importlib \
        -p no:cacheprovider --durations=5 "$@"
}

run_benchmark() {
    timeout "$1" python3 -m "benchmarks.gpu.$2" --json "$2.json" ${3:+"$3"} >"$out/$2.log" 2>&1
    echo "$2 ended with $? after $SECONDS s"
    cp "benchmarks/results/$2.json" "$out/" 2>/dev/null
    tail -n 2 "$out/$2.log" | cut -c 1-3500
}

run_tests tests/gpu/test_torch_engine_cuda.py tests/gpu/test_triton_cuda.py >"$out/tests_gpu.log" 2>&1
# A process of its own: a way that does not work takes nothing else with it.
run_tests tests/gpu/test_copy_ways.py >"$out/tests_copies.log" 2>&1
run_tests --noconftest tests/engines/test_triton_kernels.py tests/engines/test_triton_decoder.py \
    tests/orchestrator/test_device_sampling.py >"$out/tests_kernels.log" 2>&1
for log in "$out"/tests_*.log; do tail -n 4 "$log"; done
run_benchmark 80 copy_overlap "$@"
run_benchmark 140 engine_gpu "$@"
