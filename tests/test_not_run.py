"""What a run leaves out is told before its first test (not_run.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import HANG_GUARD

CONFTEST = "from not_run import *\n"
TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(1200))
def test_on_a_card(i): pass
@pytest.mark.large
def test_of_gigabytes(): pass
@pytest.mark.long
@pytest.mark.parametrize("i", range(3))
def test_of_minutes(i): pass
@pytest.mark.skipif(True, reason="no tool")
def test_with_a_tool(): pass
def test_here(): pass
def test_that_skips(): pytest.skip("not today")
"""


def run(folder: Path, *options: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines of a run of TESTS."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_a.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu:\n large:\n long:\n")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder, capture_output=True, text=True, timeout=HANG_GUARD,
        env={**inherited, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("processes", ["0", "1"])
def test_it_is_told_once_before_the_first_test(tmp_path: Path, processes: str) -> None:
    code, told = run(tmp_path, "-n", processes, "-v")
    assert code == 0
    lines = [line for line in told if line.startswith("not run: ")]
    assert lines == [
        "not run: 1,200 tests: no CUDA device on this machine",
        "not run: 3 tests: exhaustive (make test-long)",
        "not run: 1 tests: take gigabytes of memory (pytest -m large)",
        "not run: 1 tests: no tool",
    ]
    assert told.index(lines[-1]) < next(i for i, line in enumerate(told) if "PASSED" in line)
    assert " 1 passed, 1 skipped, 1205 deselected in " in told[-1]


def test_what_is_asked_for_runs(tmp_path: Path) -> None:
    code, told = run(tmp_path, "-m", "long or large")
    assert code == 0
    assert " 4 passed, " in told[-1]


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_run_in_which_all_is_skipped_fails(tmp_path: Path, processes: str) -> None:
    code, told = run(tmp_path, "-n", processes, "-k", "skips")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert " 1 skipped" in told[-1]
