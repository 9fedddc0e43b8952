#!/usr/bin/env bash
# Everything for a card with no network, part by part:
#
#   bash bench/run_gpu.sh OUT_DIR [--only PART,...] [--again] [--minutes M] [--work DIR]
#
#   build      compiles the extension for the card from the packages that are there; without pip,
#              cmake or pybind11 by nvcc alone
#   tests      the tests marked gpu
#   hashes     the same seeded inputs on the card, the CPU and the simulated kernels: same bits
#   sanitize   compute-sanitizer: memcheck, racecheck, initcheck, synccheck on those inputs; what
#              all but memcheck find in the kernels of others is told, but is no failure
#   bench      the benchmarks (FISHFAST_BENCH=gpu), as many as the time holds
#   report     tables and pictures of what was measured
#
# A part that is done leaves PART.done and is not repeated while the sources stay the same, unless
# --only names it or --again is given: a run that was cut short goes on where it was. A part that
# fails stops only what needs it. Exit code: 0 all is well, 1 a part failed, 3 a part could not be
# run here. OUT_DIR gets summary.txt, bench.json, report.md with its four pictures, and
# results.tar.gz with all of it; logs and markers lie beside them, or in --work DIR where few files
# are wanted or OUT_DIR does not last. The time is shared out so that all parts together stay within
# --minutes (default 9.5; 30 without a GPU). FISHFAST_COMMIT names the commit of a copy without git.
#
# More benchmarks than a tenth of an hour holds: --only bench,report --minutes 30 afterwards.
#
# Without a GPU it is a REHEARSAL, said loudly and marked in the JSON: the same parts on the CPU and
# the simulated kernels at toy size, so that CI tests the script itself.
set -euo pipefail
# shellcheck disable=SC2329 # the parts are called by their names

all_parts=(build tests hashes sanitize bench report)
declare -A share=([build]=80 [tests]=220 [hashes]=40 [sanitize]=110 [bench]=200 [report]=20)
readonly not_run=77 # the exit code of a part that cannot be run here

usage() {
  echo "usage: bash bench/run_gpu.sh OUT_DIR [--only PART,...] [--again] [--minutes M] [--work DIR]"
  echo "parts: ${all_parts[*]}"
}

fail() {
  echo "run_gpu.sh: $1" >&2
  usage >&2
  exit 2
}

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

# --- the parts; each runs in a shell of its own, from the repository's root ---

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
  local options=() left_out=' ' file module
  # What a missing package keeps from running is left out by name, not the whole run.
  has_module pytest_benchmark || options+=(-o "addopts=-ra --strict-markers")
  for module in hypothesis transformers peft sklearn accelerate; do
    has_module "$module" && continue
    grep -lE "^(from|import) $module" tests/*.py >"$work/left_out" || continue
    while read -r file; do
      echo "not run: $file needs $module, which is not installed"
      left_out+="$file "
    done <"$work/left_out"
  done
  if [ -n "$arch" ]; then
    # Only the files that have some: others may need what is not there. One that cannot be imported
    # is an error, and the others run.
    options+=(-m gpu --continue-on-collection-errors)
    for file in $(grep -l 'mark\.gpu' tests/test_*.py); do
      [[ "$left_out" == *" $file "* ]] || options+=("$file")
    done
    # Most of the time goes into compiling Triton kernels, on the CPU.
    if has_module xdist; then options+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
  else
    options+=(tests/test_{sparse_optimizer,capturable}_simt.py tests/test_topk_mask_cuda.py)
  fi
  "$python" -m pytest "${options[@]}" 2>&1 | tee "$work/tests.out"
  grep -qE '^=+ .*[1-9][0-9]* passed' "$work/tests.out" || { echo "no test ran"; exit 1; }
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
  rm -f "$work/bench.json" "$work/report.done"
  export FISHFAST_BENCH_SECONDS=$((limit * 85 / 100)) # the case in hand ends, and the JSON is saved
  "$python" -m pytest bench -s --benchmark-enable --benchmark-quiet \
    --benchmark-json="$work/bench.json"
}

part_report() {
  [ -s "$work/bench.json" ] || cannot_run "there is no bench.json"
  "$python" bench/report.py "$work/bench.json" -o "$work"
}

# --- which part is done, and how it went ---

sources() { # what a part's result depends on
  {
    find csrc fishfast kernels tests bench setup.py CMakeLists.txt pyproject.toml -type f \
      -regextype posix-extended -regex '.*\.(py|cu|cuh|cpp|h|sh|txt|toml)' -print0 \
      | sort -z | xargs -0 sha256sum
    echo "$arch $("$python" -c 'import sys, torch; print(sys.version, torch.__version__)')"
  } | sha256sum | cut -c1-16
}

is_done() { [ -f "$work/$1.done" ] && [ "$(cat "$work/$1.done")" = "$key" ]; }

selected() { [ -z "$only" ] || [[ ",$only," == *",$1,"* ]]; }

say() { # part, status, words
  printf '%-9s %s\n' "$1" "$2: $3" | tee "$work/$1.status"
}

went() { # part, status: is this how it went?
  [[ "$(cat "$work/$1.status" 2>/dev/null)" == "$1 "*" $2: "* ]]
}

publish() { # after every part: a time limit from outside loses nothing
  {
    [ -n "$arch" ] || echo "REHEARSAL: no GPU here; its figures say nothing about a GPU."
    local part
    for part in "${all_parts[@]}"; do
      cat "$work/$part.status" 2>/dev/null || printf '%-9s not selected\n' "$part"
    done
  } >"$work/summary.txt"
  local file
  if [ "$work" != "$out" ]; then
    for file in "$work"/{summary.txt,bench.json,report.md} "$work"/*.png; do
      if [ -f "$file" ]; then cp "$file" "$out/"; fi
    done
  fi
  (cd "$work" && find . -maxdepth 1 -type f ! -name 'results.tar.gz*' -print0 \
    | tar czf "$out/results.tar.gz.new" --null -T -)
  mv "$out/results.tar.gz.new" "$out/results.tar.gz"
}

time_for() { # the seconds of a part: its share of what is left, with those still to come
  local part total=0 left=$((deadline - SECONDS)) counting=
  for part in "${all_parts[@]}"; do
    [ "$part" = "$1" ] && counting=yes
    if [ -n "$counting" ] && selected "$part"; then total=$((total + share[$part])); fi
  done
  echo $((left > 0 ? left * share[$1] / total : 1))
}

run_part() {
  local part=$1 rc=0 start=$SECONDS log="$work/$1.log" reason
  limit=$(time_for "$part")
  echo "== $part (at most $limit s)"
  rm -f "$work/$part.done"
  # INT, so that pytest saves what it has; KILL if that does not end it.
  timeout --signal=INT --kill-after=20 "$limit" \
    "$BASH" "$self" --inside "$part" 2>&1 | tee "$log" || rc=$?
  local took=$((SECONDS - start))
  case $rc in
    0)
      echo "$key" >"$work/$part.done"
      say "$part" ok "$took s"
      ;;
    "$not_run")
      reason=$(sed -n 's/^NOT RUN: //p' "$log" | tail -1)
      say "$part" "not run" "$reason"
      ;;
    124 | 137) say "$part" failed "not done after $took s; see $part.log" ;;
    *)
      reason=$(sed -n 's/^FAILED: //p' "$log" | tail -1)
      say "$part" failed "${reason:-exit code $rc} after $took s; see $part.log"
      ;;
  esac
}

# --- ---

self=$(realpath "${BASH_SOURCE[0]}")
if [ "${1:-}" = --inside ]; then # a part, called by run_part
  "part_$2"
  exit
fi

out='' only='' again='' minutes='' work=''
while [ $# -gt 0 ]; do
  case $1 in
    --only | --minutes | --work)
      [ $# -ge 2 ] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --again) again=yes ;;
    -h | --help)
      usage
      exit
      ;;
    -*) fail "unknown option $1" ;;
    *)
      [ -z "$out" ] || fail "one OUT_DIR, got $out and $1"
      out=$1
      ;;
  esac
  shift
done
[ -n "$out" ] || fail "OUT_DIR is missing"
[[ "${minutes:-1}" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--minutes must be a number, got $minutes"
for part in ${only//,/ }; do
  [ -n "${share[$part]:-}" ] || fail "--only takes parts, got $part"
done
out=$(realpath -m "$out")
work=$(realpath -m "${work:-$out}")
mkdir -p "$out" "$work"
cd "$(dirname "$self")/.."

python=${PYTHON:-python3}
if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
arch=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("".join(map(str, torch.cuda.get_device_capability())))')
if [ -n "$arch" ]; then
  minutes=${minutes:-9.5}
  echo "== GPU with compute capability $arch"
elif [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && nvidia-smi -L 2>/dev/null | grep -q ^GPU; then
  echo "run_gpu.sh: there is a GPU that torch does not see; does its CUDA fit the driver?" >&2
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' >&2
  echo "For a rehearsal on the CPU set CUDA_VISIBLE_DEVICES to nothing." >&2
  exit 2
else
  minutes=${minutes:-30}
  echo "== REHEARSAL: no GPU here. Same parts on the CPU; its figures say nothing about a GPU."
fi
limit=0 # the seconds of the part that runs
export python arch work limit PYTHONUNBUFFERED=1 # unbuffered: the log is whole when time runs out
key=$(sources)
deadline=$((SECONDS + $(awk "BEGIN {print int(60 * $minutes)}")))

for part in "${all_parts[@]}"; do # of other sources, or cut short: nothing to go by
  selected "$part" || is_done "$part" || rm -f "$work/$part".{done,status}
done
for part in "${all_parts[@]}"; do
  selected "$part" || continue
  if [ -z "$only" ] && [ -z "$again" ] && is_done "$part"; then
    say "$part" ok "done before"
  elif [ "$part" != build ] && [ "$part" != report ] && went build failed; then
    say "$part" "not run" "the build failed"
  else
    run_part "$part"
  fi
  publish
done

echo "== in $out"
cat "$work/summary.txt"
code=0
for part in "${all_parts[@]}"; do
  selected "$part" || continue
  if went "$part" failed; then
    code=1
  elif went "$part" "not run" && [ "$code" = 0 ] && [ -n "$arch" ]; then
    code=3
  fi
done
exit "$code"
