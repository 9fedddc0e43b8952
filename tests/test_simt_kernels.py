"""Every CUDA source of the package, executed on the CPU under every schedule and sanitizer.

One test file for all kernels: a new `csrc/foo.cu` fails here until it has its check.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from simt.build import CSRC, HERE, build
from simt.check import api_of, check_of, shipped_stems
from simt.run import command_and_environment, missing_runtime
from simt.schedules import NUM_SCHEDULES, schedules

STEMS = shipped_stems()


def test_the_kernels_were_found() -> None:
    assert {"sparse_adam", "sparse_sgd", "topk_mask"} <= set(STEMS)


def test_schedules_are_many_and_of_every_kind() -> None:
    assert NUM_SCHEDULES["plain"] >= 200
    assert min(NUM_SCHEDULES.values()) >= 24
    for count in NUM_SCHEDULES.values():
        chosen = schedules(count)
        assert len(set(chosen)) == count
        assert chosen[0].seed == 0  # in order
        kinds = {(schedule.resident_blocks, schedule.reverse) for schedule in chosen}
        assert kinds == {(blocks, reverse) for blocks in (1, 2, 3, 4) for reverse in (False, True)}


@pytest.mark.parametrize("stem", STEMS)
def test_kernel_has_api_check_test_and_a_place_in_the_build(stem: str) -> None:
    assert api_of(stem).is_file()
    assert callable(check_of(stem))  # what judges its mutants, too
    # The kernel together with the Python that calls it.
    callers = HERE.parent.glob("test_*_simt.py")
    assert any(f"csrc/{stem}.cu" in path.read_text() for path in callers)
    assert f"csrc/{stem}.cu" in (CSRC.parent / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("mode", NUM_SCHEDULES)
@pytest.mark.parametrize("stem", STEMS)
def test_kernel_is_right_under_every_schedule(stem: str, mode: str, tmp_path: Path) -> None:
    missing = missing_runtime(mode)
    if missing:
        pytest.skip(f"{missing} is not installed beside g++")
    library = build([CSRC / f"{stem}.cu", api_of(stem)], tmp_path / f"{mode}.so", mode)
    count = NUM_SCHEDULES[mode]
    arguments = ["-m", "simt.check", stem, str(library), str(count)]
    command, environment = command_and_environment(mode, arguments)
    result = subprocess.run(
        command, env=environment, cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == f"{stem}: right under {count} schedules\n"
    assert "Sanitizer" not in result.stderr
