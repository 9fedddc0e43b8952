"""Run Python with a sanitizer's runtime preloaded, as a library built with that mode needs.

By hand::

    python tests/simt/run.py tsan script.py arguments...
    python tests/simt/run.py asan -m pytest tests/test_foo.py
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The sanitizers' runtimes come with g++.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "asan": ("libasan.so", "libubsan.so"),
    "tsan": ("libtsan.so",),
}


def missing_runtime(mode: str) -> str | None:
    """Return the name of the sanitizer library that this compiler lacks, or None."""
    for name in RUNTIMES[mode]:
        if not Path(_library(name)).exists():
            return name
    return None


def command_and_environment(
    mode: str, arguments: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Build the command that runs Python with `arguments` under a sanitizer.

    Args:
        mode: "plain", "asan" or "tsan".
        arguments: What follows `python`: a script or `-m module`, and its arguments.

    Returns:
        The command, and the complete environment to run it in.
    """
    environment = dict(os.environ)
    # NumPy's thread pools are none of our business, and slow under a sanitizer.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    if mode == "plain":
        return command, environment
    environment["LD_PRELOAD"] = ":".join(_library(name) for name in RUNTIMES[mode])
    # Python itself leaks by design. Exit codes: 66 for TSan; 1 for the others.
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    environment["TSAN_OPTIONS"] = f"exitcode=66 history_size=1 suppressions={HERE / 'tsan.supp'}"
    if mode == "tsan":
        command = [*_without_address_randomization(), *command]
    return command, environment


def _library(name: str) -> str:
    result = subprocess.run(
        [os.environ.get("CXX", "g++"), f"-print-file-name={name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()  # the bare name if there is none


def _without_address_randomization() -> list[str]:
    # TSan before GCC 14 dies with "unexpected memory mapping" on kernels that randomize 32 bits
    # (Ubuntu 24.04, GitHub runners). Some containers forbid setarch; most kernels do not need it.
    if shutil.which("setarch") is None:
        return []
    prefix = ["setarch", platform.machine(), "-R"]
    allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


def main() -> None:
    """Replace this process by the command."""
    if len(sys.argv) < 3 or sys.argv[1] not in RUNTIMES:
        sys.exit(f"usage: python tests/simt/run.py {'|'.join(RUNTIMES)} script.py arguments...")
    missing = missing_runtime(sys.argv[1])
    if missing:
        sys.exit(f"{missing} does not come with this compiler")
    command, environment = command_and_environment(sys.argv[1], sys.argv[2:])
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
