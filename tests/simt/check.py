"""Run one kernel's own check in a process of its own, under any mode of build.py.

The check of `csrc/foo.cu` is `checks_foo.py` here, with one function::

    def check(lib: SimtLibrary, schedule: Schedule) -> None   # AssertionError if a result is wrong

It runs under every schedule in CI, under the sanitizers, and against every mutant (mutate.py). It
is plain NumPy: torch takes seconds to import, and more under a sanitizer.

By hand, in tests/::

    python simt/run.py tsan -m simt.check foo LIBRARY.so 24
"""

from __future__ import annotations

import importlib
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .build import CSRC, HERE
from .library import SimtLibrary
from .schedules import Schedule, schedules

DEFECT_FOUND = 3  # the exit status of a wrong result, or of a defect that the runtime named

Check = Callable[[SimtLibrary, Schedule], None]


def shipped_stems() -> list[str]:
    """Return the names of all CUDA sources of the package, without ".cu"."""
    return sorted(path.stem for path in CSRC.glob("*.cu"))


def check_of(stem: str) -> Check:
    """Return the check of a kernel, from checks_<stem>.py."""
    return importlib.import_module(f".checks_{stem}", __package__).check


def api_of(stem: str) -> Path:
    """Return the file with the extern "C" functions of a kernel."""
    return HERE / f"{stem}_api.cpp"


def main() -> None:
    """Check a library under the first schedules; exit with DEFECT_FOUND at the first defect."""
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: python -m simt.check STEM LIBRARY.so NUMBER_OF_SCHEDULES [CPU_SECONDS]")
    stem, library, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if len(sys.argv) == 5:  # SIGXCPU ends it
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[4]), hard))
    check = check_of(stem)
    lib = SimtLibrary(library)
    for schedule in schedules(count):
        schedule.apply(lib)
        try:
            check(lib, schedule)
        except (AssertionError, RuntimeError):  # RuntimeError: what SimtLibrary.call raises
            traceback.print_exc()
            print(f"under {schedule}", file=sys.stderr)
            sys.exit(DEFECT_FOUND)
    print(f"{stem}: right under {count} schedules")


if __name__ == "__main__":
    main()
