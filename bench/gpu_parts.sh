#!/usr/bin/env bash
# The parts of run_gpu.sh, each in a process of its own: bash bench/gpu_parts.sh PART
#
# run_gpu.sh says what they do, and exports what they need: the python, the card's architecture ("":
# a rehearsal), the folder of their files and their seconds.
set -euo pipefail
# shellcheck disable=SC2329 # the parts are called by their names
: "${python:?}" "${arch?}" "${work:?}" "${limit:?}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly not_run=77 # the exit code of a part that cannot be run here

cannot_run() { # the last line of a log that starts so is the reason in the summary
  echo "NOT RUN: $1"
  exit "$not_run"
}

stop() { # likewise, of a part that failed
  echo "FAILED: $1"
  exit 1
}

has_module() {
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"
}

part_build() {
  local module missing=()
  for module in torch triton numpy safetensors tqdm tabulate click; do
    has_module "$module" || missing+=("$module")
  done
  [ "${#missing[@]}" -eq 0 ] || stop "fishfast and its benchmarks need ${missing[*]}, not installed"
  # No asking for newer versions of pip, where there is no network to answer.
  export PIP_DISABLE_PIP_VERSION_CHECK=1 FISHFAST_REQUIRE_EXT=1
  if [ -n "$arch" ]; then export FISHFAST_CUDA=on FISHFAST_CUDA_ARCHS="$arch"; fi
  if ! "$python" -m pip install --no-build-isolation --no-deps -e .; then
    [ -n "$arch" ] || stop "pip could not install it"
    echo "== pip could not install it: by nvcc alone"
    "$python" bench/build_in_place.py "$arch" || stop "neither pip nor nvcc alone could build it"
  fi
  "$python" -c 'import json, fishfast; print(json.dumps(fishfast.build_info(), indent=2))' \
    | tee "$work/build_info.json"
  if [ -n "$arch" ]; then # or torch's own operations would be tested and timed
    "$python" -c 'import sys, fishfast
off = fishfast.build_info()["unavailable"]
sys.exit("; ".join(f"{name}: {why}" for name, why in off.items()) or 0)' \
      || stop "a backend is not available; the line above says why"
  fi
}

part_tests() {
  has_module pytest || cannot_run "pytest is not installed"
  trap : INT # at the time limit pytest says what it did not reach
  local options=(-p bench.tests_outcome) files
  # What a missing package keeps from running is left out by name, not the whole run.
  has_module pytest_benchmark || options+=(-o "addopts=-ra --strict-markers")
  if [ -n "$arch" ]; then
    files=$("$python" bench/gpu_tests.py)
    # shellcheck disable=SC2206 # one name a line, without blanks
    options+=(-m gpu --continue-on-collection-errors $files)
    # Most of the time goes into compiling Triton kernels, on the CPU.
    if has_module xdist; then options+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
  else
    options+=(tests/test_{sparse_optimizer,capturable}_simt.py tests/test_topk_mask_cuda.py)
  fi
  "$python" -m pytest "${options[@]}" 2>&1 | tee -i "$work/tests.out"
  grep -qE '^=+ .*[1-9][0-9]* passed' "$work/tests.out" || stop "no test ran"
}

part_hashes() {
  local devices=(cpu) device files=()
  [ -n "$arch" ] && devices+=(cuda)
  command -v "${CXX:-g++}" >/dev/null && devices+=(simulated)
  for device in "${devices[@]}"; do
    files+=("$work/hashes-$device.json")
    "$python" bench/fingerprints.py run "$device" "${files[-1]}"
  done
  "$python" bench/fingerprints.py compare "${files[@]}"
  command -v "${CXX:-g++}" >/dev/null || cannot_run "the simulated kernels: no g++ (the rest agrees)"
}

part_sanitize() {
  local sanitizer
  [ -n "$arch" ] || cannot_run "no GPU"
  sanitizer=$(command -v compute-sanitizer || true)
  sanitizer=${sanitizer:-${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer}
  [ -x "$sanitizer" ] || cannot_run "compute-sanitizer is not installed"
  # Each tensor an allocation of its own, or an overrun would end in torch's cached block.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool found=()
  for tool in memcheck racecheck initcheck synccheck; do sanitize "$tool" bits; done
  sanitize memcheck fisher # last: it loads cuBLAS and cuDNN, which takes longest
  [ "${#found[@]}" -eq 0 ] || stop "errors found by: ${found[*]}"
}

sanitize() { # tool, what: in the caller's part; adds to found
  local tool=$1 what="$1 of $2" log="$work/sanitize-$1-$2.out" rc=0 left=$((limit - SECONDS - 5))
  # torch asks the driver for functions it may not have, and takes no for an answer.
  local options=(--tool "$tool" --error-exitcode 99 --report-api-errors no --print-limit 1000)
  echo "== $what"
  [ "$left" -gt 0 ] || { found+=("$what: no time was left"); return; }
  timeout --kill-after=5 "$left" "$sanitizer" "${options[@]}" \
    "$python" bench/fingerprints.py run cuda "$log.json" --only "$2" 2>&1 | tee "$log" || rc=$?
  if grep -q "Device not supported" "$log"; then
    cannot_run "compute-sanitizer does not support this device"
  fi
  if [ "$rc" = 124 ] || [ "$rc" = 137 ]; then
    found+=("$what: not done after $left s")
  elif ! grep -q "SUMMARY:" "$log"; then # it has looked at nothing
    found+=("$what, which gave no summary")
  elif [ "$rc" = 99 ] && [ "$tool" != memcheck ] && ! grep -q ' at .*fishfast' "$log"; then
    # torch's own kernels read what they do not use, and warps of CUB's rely on each other.
    echo "$what: errors in the kernels of others only"
  elif [ "$rc" != 0 ]; then
    found+=("$what")
  fi
}

part_bench() {
  local module
  for module in pytest pytest_benchmark; do
    has_module "$module" || cannot_run "$module is not installed"
  done
  if [ -n "$arch" ]; then
    export FISHFAST_BENCH="${FISHFAST_BENCH:-gpu}"
  else
    export FISHFAST_BENCH=toy
  fi
  trap : INT # at the time limit pytest saves what it has
  export FISHFAST_BENCH_SECONDS=$((limit * 85 / 100)) # the case in hand ends, and the JSON is saved
  "$python" -m pytest bench -s --benchmark-enable \
    --benchmark-json="$work/bench.json" && return
  [ -s "$work/bench.json" ] || stop "no figure was written"
  stop "$("$python" bench/figures.py "$work/bench.json" 2>&1 | tail -1)"
}

part_report() {
  [ -s "$work/bench.json" ] || cannot_run "there is no bench.json"
  "$python" bench/report.py "$work/bench.json" -o "$work"
}

"part_$1"
