#!/usr/bin/env bash
# All that needs a GPU, in about five minutes, on a machine with PyTorch and Triton alone: the tests
# first, then the benchmarks in the form that the first argument asks for (--quick, or nothing).
# Logs and results go to $OUT, or to the current folder.
set -u
cd "$(dirname "$0")/../.."
out=${OUT:-.}
export PYTHONPATH=.

# The project's pytest options need plugins that are not there.
run_tests() {
    timeout 110 python3 -m pytest -q -c /dev/null --rootdir=. --import-mode=importlib \
        -p no:cacheprovider --durations=8 "$@"
}

run_tests tests/gpu >"$out/tests_gpu.log" 2>&1
run_tests --noconftest tests/engines/test_triton_kernels.py tests/engines/test_triton_decoder.py \
    tests/orchestrator/test_device_sampling.py >"$out/tests_kernels.log" 2>&1
for benchmark in engine_gpu attention_tiles copy_overlap; do
    timeout 150 python3 -m "benchmarks.gpu.$benchmark" --json "$benchmark.json" ${1:+"$1"} \
        >"$out/$benchmark.log" 2>&1
done
cp benchmarks/results/{engine_gpu,attention_tiles,copy_overlap}.json "$out/" 2>/dev/null
tail -n 25 "$out"/tests_*.log
tail -n 3 "$out"/{copy_overlap,engine_gpu}.log
grep 'GB/s with' "$out/attention_tiles.log"
