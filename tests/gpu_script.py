"""bench/run_gpu.sh on a small copy of the repository, with a python and a card of cardboard."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

from processes import HANG_GUARD

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["build", "tests", "hashes", "sanitize", "bench", "report"]

# Answers what run_gpu.sh asks a python. $ARCH: the card; $LACKS: packages that are not there;
# $BROKEN: a word of a command that fails; $SLOW: one that does not end, logged as soon as a signal
# may come; $LOG: every call.
PYTHON = """#!/usr/bin/env bash
[ -n "$SLOW" ] && [[ "$*" == *"$SLOW"* ]] && {
  trap 'echo "FAILED: 2 passed" && exit 2' INT
  echo "$*" >>"$LOG"
  while :; do sleep 0.1; done
}
echo "$*" >>"$LOG"
[ -n "$BROKEN" ] && [[ "$*" == *"$BROKEN"* ]] && exit 9
case "$*" in
  *get_device_capability*) echo "$ARCH" ;;
  *find_spec*) for name in $LACKS; do [[ "$*" == *"'$name'"* ]] && exit 1; done ;;
  *--benchmark-json=*) all="$*" && echo '{}' >"${all##*--benchmark-json=}" ;;
  *"pip install"*) touch fishfast/_C.so ;;
  *bench/figures.py*) echo "1 figures, 1 failed: CUB on n=1" ;;
  *bench/report.py*) touch "${!#}/training.png" ;;
  *gpu_tests.py*) echo "not run: test_a.py needs peft" >&2 && echo tests/test_b.py ;;
  *"-m pytest"*) echo "== 3 passed, 1 skipped in 0.1s ==" ;;
esac
exit 0
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >>"$LOG"
[ -n "$REFUSES" ] && echo "Device not supported"
[ -n "$SLOW" ] && [[ "$*" == *"$SLOW"* ]] && sleep 36000
[ -n "$MUTE" ] || echo "========= ERROR SUMMARY: 0 errors"
[ -n "$FINDS" ] && [[ "$*" == *"$FINDS"* ]] && echo "=========     at $WHOSE" && exit 99
exit 0
"""

# The real one, with a clock of cardboard: the time of a command with $LATE in it is up once $SLOW
# has begun, that of all others never. SIGALRM is how `timeout` hears of its own clock.
TIMEOUT = """#!/usr/bin/env bash
echo "$*" >>"$LOG.limits"
[ -n "$LATE" ] && [[ "$*" == *"$LATE"* ]] && {
  (until grep -q "$SLOW" "$LOG"; do sleep 0.1; done; kill -ALRM $$) &
}
options=()
while [[ "$1" == -* ]]; do options+=("$1") && shift; done
shift
exec /usr/bin/timeout "${options[@]}" 36000 "$@"
"""


class Script:
    """Runs the script on a small copy of the repository."""

    def __init__(self, folder: Path) -> None:
        self.out, self.root, self.bin = folder / "out", folder / "repo", folder / "bin"
        self.log = folder / "log"
        for room in ("bench", "csrc", "fishfast", "kernels", "tests"):
            (self.root / room).mkdir(parents=True)
        for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
            (self.root / name).touch()
        for name in ("run_gpu.sh", "gpu_parts.sh"):
            shutil.copy(ROOT / "bench" / name, self.root / "bench")
        self.bin.mkdir()
        self.put("python3", PYTHON)
        self.put("timeout", TIMEOUT)
        self.put("g++", "#!/bin/sh\n")

    def put(self, name: str, text: str) -> None:
        file = self.bin / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def __call__(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*options, **environment)
        stdout, stderr = process.communicate(timeout=HANG_GUARD)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        self.log.write_text("")
        names = ("ARCH", "LACKS", "BROKEN", "SLOW", "LATE", "REFUSES", "FINDS", "WHOSE", "MUTE")
        environment = {**dict.fromkeys(names, ""), **environment, "LOG": str(self.log)}
        environment["PATH"] = f"{self.bin}:/usr/bin:/bin"
        environment["CUDA_HOME"] = "/nowhere"
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "CXX")}
        return subprocess.Popen(
            ["bash", str(self.root / "bench" / "run_gpu.sh"), str(self.out), *options],
            env={**inherited, **environment}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=self.out.parent, start_new_session=True,
        )  # fmt: skip

    def summary(self) -> dict[str, str]:
        """Return part -> status and reason, without how many seconds it took."""
        lines = (self.out / "summary.txt").read_text().splitlines()
        rows = [line.split(maxsplit=1) for line in lines if line.split()[0] in PARTS]
        return {part: words.split(": ")[0] if " s" in words else words for part, words in rows}

    def calls(self, word: str) -> int:
        return sum(word in line for line in self.log.read_text().splitlines())
