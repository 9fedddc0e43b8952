"""bench/run_gpu.sh: parts that resume, fail, or cannot run; with a python and a card of cardboard.

The parts themselves run in CI's rehearsal (.ci/run); here is what the script makes of them.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from gpu_script import PARTS, PYTHON, SANITIZER, Script


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_a_rehearsal_is_marked_and_passes_without_what_needs_a_card(script: Script) -> None:
    result = script()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("== REHEARSAL: no GPU here.")
    assert (script.out / "summary.txt").read_text().startswith("REHEARSAL")
    assert script.summary() == {**dict.fromkeys(PARTS, "ok"), "sanitize": "not run: no GPU"}
    assert script.calls("test_sparse_optimizer_simt.py") == 1
    with tarfile.open(script.out / "results.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {"summary.txt", "bench.json", "build.log", "tests.log", "report.done"} <= names


def test_a_failing_part_is_named_and_stops_only_what_needs_it(script: Script) -> None:
    result = script(BROKEN="--benchmark-json")
    assert result.returncode == 1
    assert script.summary() == {
        "build": "ok", "tests": "ok", "hashes": "ok", "sanitize": "not run: no GPU",
        "bench": "failed", "report": "not run: there is no bench.json",
    }  # fmt: skip
    assert "bench     failed: no figure was written after" in result.stdout
    result = script()  # repaired: only what is missing runs
    assert result.returncode == 0
    assert (script.calls("fingerprints.py"), script.calls("--benchmark-json")) == (0, 1)


def test_nothing_is_measured_on_a_failed_build(script: Script) -> None:
    result = script(BROKEN="pip install")
    assert "build     failed: pip could not install it after" in result.stdout
    assert result.returncode == 1
    assert script.summary()["build"] == "failed"
    assert script.summary()["bench"] == "not run: the build failed"
    assert script.calls("pytest") == 0


def test_nvcc_alone_builds_where_pip_cannot(script: Script) -> None:
    result = script("--only", "build", ARCH="90", BROKEN="pip install")
    assert result.returncode == 0
    assert script.calls("bench/build_in_place.py 90") == 1


def test_a_build_without_the_card_is_a_failure(script: Script) -> None:
    """Torch's own operations would be tested and timed in its place."""
    result = script("--only", "build", ARCH="90", BROKEN="unavailable")
    assert result.returncode == 1
    assert "build     failed: a backend is not available" in result.stdout


def test_what_the_package_needs_is_named_first(script: Script) -> None:
    result = script(LACKS="tqdm tabulate")
    assert result.returncode == 1
    assert "failed: fishfast and its benchmarks need tqdm tabulate, not installed" in result.stdout
    assert script.calls("pip install") == 0


def test_a_card_that_torch_does_not_see_is_no_rehearsal(script: Script) -> None:
    script.put("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    result = script()
    assert result.returncode == 2
    assert "there is a GPU that torch does not see" in result.stderr
    assert script("--only", "hashes", CUDA_VISIBLE_DEVICES="").returncode == 0


def test_no_test_that_passed_is_a_failure(script: Script) -> None:
    script.put("python3", PYTHON.replace("3 passed, ", ""))
    result = script("--only", "tests")
    assert result.returncode == 1
    assert "no test ran" in result.stdout


def test_the_four_sanitizers_run_on_a_card(script: Script) -> None:
    script.put("compute-sanitizer", SANITIZER)
    result = script(ARCH="90")
    assert result.returncode == 0, result.stdout
    assert script.summary() == dict.fromkeys(PARTS, "ok")
    for tool in ("racecheck", "initcheck", "synccheck"):
        assert script.calls(f"sanitizer --tool {tool}") == 1
    assert script.calls("sanitizer --tool memcheck") == 2  # Triton's kernels, too
    assert script.calls("--report-api-errors no") == 5
    assert (script.out / "sanitize.done").exists()
    assert script.calls("-m gpu") == 1
    result = script("--only", "sanitize", ARCH="90", MUTE="yes")
    assert "errors found by: memcheck of bits, which gave no summary" in result.stdout


@pytest.mark.parametrize(
    ("tool", "whose", "blamed"),
    [
        ("racecheck", "fishfast::topk::count(Work)+0x110", True),
        ("racecheck", "void cub::DeviceRadixSort()+0x110", False),
        ("memcheck", "void at::native::index_kernel()+0x110", True),  # with indices of ours
    ],
)
def test_errors_in_kernels_of_others(script: Script, tool: str, whose: str, blamed: bool) -> None:
    script.put("compute-sanitizer", SANITIZER)
    result = script("--only", "sanitize", ARCH="90", FINDS=tool, WHOSE=whose)
    assert result.returncode == blamed, result.stdout
    expected = f"failed: errors found by: {tool} of bits" if blamed else "kernels of others only"
    assert expected in result.stdout


def test_a_sanitizer_without_end_leaves_the_findings_of_the_others(script: Script) -> None:
    script.put("compute-sanitizer", SANITIZER)
    result = script(
        "--only", "sanitize", ARCH="90", SLOW="synccheck", LATE="tool synccheck", FINDS="racecheck",
        WHOSE="fishfast::topk::count(Work)+0x110",
    )  # fmt: skip
    assert result.returncode == 1
    assert "found by: racecheck of bits synccheck of bits: not done after" in result.stdout


def test_a_sanitizer_without_time_is_no_clean_one(script: Script) -> None:
    script.put("compute-sanitizer", SANITIZER)
    result = script("--only", "sanitize", "--minutes", "0.08", ARCH="90")
    assert result.returncode == 1
    for what in ("memcheck of bits", "synccheck of bits", "memcheck of fisher"):
        assert f"{what}: no time was left" in result.stdout
    assert script.calls("sanitizer --tool") == 0


@pytest.mark.parametrize(
    ("there", "reason"),
    [(False, "compute-sanitizer is not installed"), (True, "compute-sanitizer does not support")],
)
def test_a_card_without_sanitizer_is_not_green(script: Script, there: bool, reason: str) -> None:
    if there:
        script.put("compute-sanitizer", SANITIZER)
    result = script("--only", "sanitize", ARCH="90", REFUSES="yes", FINDS="memcheck")
    assert result.returncode == 3
    assert f"sanitize  not run: {reason}" in result.stdout


def test_missing_packages_are_named_and_the_rest_runs(script: Script) -> None:
    result = script(LACKS="pytest_benchmark", ARCH="90")
    assert result.returncode == 3
    assert "not run: test_a.py needs peft" in result.stdout
    assert script.calls("-p bench.tests_outcome -o addopts") == 1
    assert script.calls("tests/test_b.py") == 1
    assert "bench     not run: pytest_benchmark is not installed" in result.stdout
    assert script.summary()["tests"] == "ok"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "speed"], "--only takes parts, got speed"),
        (["--only"], "--only needs a value"),
        (["--minutes", "ten"], "--minutes must be a number, got ten"),
        (["--fast"], "unknown option --fast"),
        (["--only", ","], "--only takes parts, got ,"),
        (["two"], "one OUT_DIR"),
    ],
)
def test_wrong_options_are_refused(script: Script, options: list[str], words: str) -> None:
    result = script(*options)
    assert result.returncode == 2
    assert words in result.stderr
    assert not script.out.exists()


def test_a_python_without_torch_is_refused(script: Script) -> None:
    result = script(BROKEN="get_device_capability")
    assert result.returncode == 2
    assert "python3 cannot import torch; PYTHON names another" in result.stderr


def test_a_contender_that_failed_is_named_beside_the_figures(script: Script) -> None:
    written = '--benchmark-json=}"'
    script.put("python3", PYTHON.replace(written, written + " && exit 1"))
    result = script("--only", "bench,report")
    assert result.returncode == 1
    assert "bench     failed: 1 figures, 1 failed: CUB on n=1 after" in result.stdout
    assert script.summary()["report"] == "ok"
