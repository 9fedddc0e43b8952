#!/usr/bin/env bash
# bench/run_gpu.sh OUT_DIR: everything for a card with no network. Builds the extension for the
# card's architecture from the packages that are there, runs the GPU tests, measures, and leaves
# logs and JSON in OUT_DIR. Without a GPU it is a rehearsal: the same steps on the CPU, said loudly
# and marked in the JSON, so that CI tests the script itself.
set -euo pipefail

out=$(realpath -m "${1:?usage: bench/run_gpu.sh OUT_DIR}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
export PYTHONUNBUFFERED=1 # so that the log is whole when a time limit ends the run

arch=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("".join(map(str, torch.cuda.get_device_capability())))')

if [ -n "$arch" ]; then
  echo "== GPU with compute capability $arch"
  export FISHFAST_CUDA=on FISHFAST_CUDA_ARCHS="$arch"
  tests=(-m gpu)
else
  echo "== REHEARSAL: no GPU here. Same steps on the CPU; its figures say nothing about a GPU."
  tests=(tests/test_sparse_adam*.py tests/test_{sparse_optimizer,topk_mask}_simt.py
    tests/test_topk_mask_cuda.py)
fi

echo "== build"
"$python" -m pip install --no-build-isolation --no-deps -e . 2>&1 | tee "$out/build.log" | tail -1
"$python" -c 'import json, fishfast; print(json.dumps(fishfast.build_info(), indent=2))' \
  | tee "$out/build_info.json"

echo "== tests"
"$python" -m pytest "${tests[@]}" 2>&1 | tee "$out/tests.log"
grep -qE '^=+ .*[1-9][0-9]* passed' "$out/tests.log" || { echo "no test ran"; exit 1; }

echo "== benchmarks"
"$python" -m pytest bench -s --benchmark-enable --benchmark-json="$out/bench.json" 2>&1 \
  | tee "$out/bench.log"
echo "== done: $(ls "$out" | tr '\n' ' ')"
