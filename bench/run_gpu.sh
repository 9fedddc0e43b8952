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
# run on this card. OUT_DIR gets summary.txt, bench.json, report.md with its four pictures, and
# results.tar.gz with all of it; logs and markers lie beside them, or in --work DIR where few files
# are wanted or OUT_DIR does not last. The time is shared out so that all parts together stay within
# --minutes (default 9.5; 30 without a GPU). FISHFAST_COMMIT names the commit of a copy without git.
#
# More benchmarks than a tenth of an hour holds: --only bench,report --minutes 30 afterwards.
#
# Ctrl-C ends the part in hand, and the next run goes on with it. What the parts do is in
# gpu_parts.sh.
#
# Without a GPU it is a REHEARSAL, said loudly and marked in the JSON: the same parts on the CPU and
# the simulated kernels at toy size, so that CI tests the script itself.
set -euo pipefail

rooms=(csrc fishfast kernels tests bench) # of the sources
pictures=({topk_time,step_density,fisher_size,training}.png)
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

# --- which part is done, and how it went ---

sources() { # what a part's result depends on
  {
    find "${rooms[@]}" setup.py CMakeLists.txt pyproject.toml \
      -regextype posix-extended \( -samefile "$out" -o -samefile "$work" \) -prune -o -type f \
      -regex '.*\.(py|cu|cuh|cpp|h|sh|txt|toml)' -print0 | sort -z | xargs -0 sha256sum
    echo "$PWD $arch $("$python" -c 'import sys, torch; print(sys.version, torch.__version__)')"
  } | sha256sum | cut -c1-16
}

is_done() {
  [ "$1" != build ] || compgen -G "fishfast/_C*.so" >/dev/null || return 1
  [ -f "$work/$1.done" ] && [ "$(cat "$work/$1.done")" = "$key" ]
}

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
      cat "$work/$part.status" 2>/dev/null && continue
      printf '%-9s not %s\n' "$part" "$(selected "$part" && echo reached || echo selected)"
    done
  } >"$work/summary.txt"
  local file
  if [ "$work" != "$out" ]; then
    for file in summary.txt bench.json report.md "${pictures[@]}"; do
      rm -f "$out/$file" # of a run before
      if [ -f "$work/$file" ]; then cp "$work/$file" "$out/"; fi
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
  left=$((left * share[$1] / total))
  echo $((left > 0 ? left : 1)) # timeout takes 0 for no limit
}

run_part() {
  local part=$1 rc=0 start=$SECONDS log="$work/$1.log" reason
  limit=$(time_for "$part")
  echo "== $part (at most $limit s)"
  rm -f "$work/$part".{done,status}
  [ "$part" = bench ] && rm -f "$work"/{bench.json,report.{done,status,md}} "${pictures[@]/#/$work/}"
  # INT, so that pytest saves what it has; KILL if that does not end it. In the background, or this
  # shell would hear of Ctrl-C at the part's end.
  { "$BASH" -c 'echo $$ >"$work/running" && exec timeout "$@"' - \
    --signal=INT --kill-after=20 "$limit" "$BASH" bench/gpu_parts.sh "$part" 2>&1 | tee -i "$log"; } &
  while wait $! || rc=$?; kill -0 $! 2>/dev/null; do :; done # a signal ends `wait`, not the part
  rm -f "$work/running"
  local took=$((SECONDS - start))
  reason=$(sed -n 's/^FAILED: //p' "$log" | tail -1)
  [ -z "$interrupted" ] || rc=interrupted
  case $rc in
    0)
      echo "$key" >"$work/$part.done"
      say "$part" ok "$took s"
      ;;
    "$not_run")
      reason=$(sed -n 's/^NOT RUN: //p' "$log" | tail -1)
      say "$part" "not run" "$reason"
      ;;
    interrupted) say "$part" failed "interrupted after $took s${reason:+; $reason}" ;;
    124 | 137) say "$part" failed "not done after $took s${reason:+; $reason}; see $part.log" ;;
    *)
      say "$part" failed "${reason:-exit code $rc} after $took s; see $part.log"
      ;;
  esac
}

# --- ---

out='' only='' again='' minutes='' work=''
while [ $# -gt 0 ]; do
  case $1 in
    --only | --minutes | --work)
      [ -n "${2:-}" ] || fail "$1 needs a value"
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
[[ "${only:-build}" == *[!,]* ]] || fail "--only takes parts, got $only"
for part in ${only//,/ }; do
  [ -n "${share[$part]:-}" ] || fail "--only takes parts, got $part"
done
out=$(realpath -m "$out")
work=$(realpath -m "${work:-$out}")
mkdir -p "$out" "$work" || fail "no such folder can be made"
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
for folder in "$out" "$work"; do
  [ -w "$folder" ] || fail "$folder cannot be written"
  for room in . "${rooms[@]}"; do
    ! [ "$folder" -ef "$room" ] || fail "$folder has the sources: take a folder of its own"
  done
done

python=${PYTHON:-python3}
if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; fi
arch=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("".join(map(str, torch.cuda.get_device_capability())))') \
  || fail "$python cannot import torch; PYTHON names another"
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
interrupted=''
trap 'interrupted=yes; kill -INT "$(cat "$work/running")" 2>/dev/null || true' INT TERM
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
  [ -z "$interrupted" ] || break
done

echo "== in $out"
cat "$work/summary.txt"
[ -z "$interrupted" ] || exit 130
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
