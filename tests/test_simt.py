"""The SIMT runtime itself: right kernels are right under every schedule, planted bugs are named.

Each test counts what it ran; nothing here passes because nothing happened.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import HANG_GUARD
from simt.build import CSRC, HERE, build
from simt.library import SimtLibrary
from simt.run import command_and_environment, missing_runtime
from simt.samples import SAMPLES, Omit, block_scan, check_all, compact
from simt.schedules import schedules

SOURCES = [HERE / "samples.cu", HERE / "planted_bugs.cu", HERE / "planted_bugs_api.cpp"]
NUM_SEEDS = 40
NUM_SANITIZER_SEEDS = {"asan": 8, "tsan": 24}

NAMED_BY_THE_RUNTIME = {
    "two_barriers": r"barrier divergence: .* waits at line \d+ at .*planted_bugs.cu:\d+",
    "return_before_barrier": "barrier divergence: .*returned",
    "lane_outside_mask": r"bad lane mask .*lane outside its mask at .*\(block 0, thread 20\)",
    "lane_does_not_exist": "bad lane mask .*does not exist",
    "lane_has_returned": "bad lane mask .*has returned",
    "shuffle_from_outside_mask": "bad lane mask .*a shuffle reads lane 31",
    "two_collectives": r"warp collective mismatch: lane \d+ ",
    "warp_waits_for_block": r"deadlock \(nobody can run\): .* warp collective at .*planted_bugs.cu",
    "flag_never_set": r"deadlock \(endless spin\): thread 0 of block 0 .*planted_bugs.cu:\d+",
    "lock_never_released": r"deadlock \(endless spin\): .*planted_bugs.cu:\d+",
    "too_many_threads": "invalid launch: threads per block is 2048, must be 1 to 1024",
}

NAMED_BY_ASAN = {
    "shared_overrun": "index 64 out of bounds for type 'int [64]'",
    "dynamic_shared_overrun": "heap-buffer-overflow",
    "global_overrun": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
    "index_overflow": "signed integer overflow",
}

# bug or sample, and what is left out of the sample
NAMED_BY_TSAN = [
    ("--bug", "global_race"),
    ("--bug", "handover_without_fence"),
    ("--sample", "grid_sum", "--omit", "fence"),
    ("--sample", "block_scan", "--omit", "barrier"),
    ("--sample", "swap_neighbours", "--omit", "sync_warp"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="module")
def plain_library(folder: Path) -> Path:
    return build(SOURCES, folder / "plain.so")


@pytest.fixture
def lib(plain_library: Path) -> SimtLibrary:
    library = SimtLibrary(plain_library)
    library.schedule()  # in order
    return library


def sanitized_library(folder: Path, mode: str) -> Path:
    missing = missing_runtime(mode)
    if missing:
        pytest.skip(f"{missing} is not installed beside g++")
    path = folder / f"{mode}.so"
    return path if path.exists() else build(SOURCES, path, mode)


def run_samples(mode: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run samples.py in a process that has the sanitizer preloaded."""
    command, environment = command_and_environment(
        mode, ["-m", "simt.samples", str(library), *arguments]
    )
    return subprocess.run(
        command,
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
    )


# --- correct kernels ---


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_is_right_under_every_schedule(lib: SimtLibrary, name: str) -> None:
    traces = set()
    for schedule in schedules(NUM_SEEDS):
        schedule.apply(lib)
        got, expected = SAMPLES[name](lib, schedule.seed)
        np.testing.assert_array_equal(got, expected, err_msg=str(schedule))
        traces.add(lib.trace)
    assert len(traces) == NUM_SEEDS  # forty different runs, not one run forty times


def test_same_seed_is_the_same_run(lib: SimtLibrary) -> None:
    traces = []
    for _ in range(2):
        lib.schedule(seed=5, resident_blocks=3)
        compact(lib, 5)
        traces.append(lib.trace)
    assert traces[0] == traces[1]


def test_compaction_on_two_os_threads(lib: SimtLibrary) -> None:
    for seed in range(6):
        lib.schedule(seed=seed, resident_blocks=2, threads=2)
        got, expected = compact(lib, seed)
        np.testing.assert_array_equal(got, expected)


def test_samples_are_right_with_ucontext(folder: Path) -> None:
    library = build(SOURCES, folder / "ucontext.so", defines=["SIMT_USE_UCONTEXT"])
    assert check_all(SimtLibrary(library), 8) == 8 * len(SAMPLES)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_the_same_sources(folder: Path) -> None:
    command = ["nvcc", "-std=c++17", "-lib", f"-I{CSRC}", f"-I{HERE}"]
    for architecture in (80, 90):
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    kernels = [str(source) for source in SOURCES if source.suffix == ".cu"]
    out = folder / "kernels.a"
    subprocess.run([*command, *kernels, "-o", str(out)], check=True, timeout=HANG_GUARD)
    assert out.stat().st_size > 0


# --- planted bugs that the runtime names ---


@pytest.mark.parametrize("bug", NAMED_BY_THE_RUNTIME)
@pytest.mark.parametrize("seed", [0, 3])
def test_bug_is_named(lib: SimtLibrary, bug: str, seed: int) -> None:
    lib.schedule(seed=seed)
    data = np.zeros(64, np.int32)
    with pytest.raises(RuntimeError, match=NAMED_BY_THE_RUNTIME[bug]):
        lib.call("ff_planted_bug", bug, data, data.size)
    # The runtime is usable after an error.
    lib.schedule()
    got, expected = block_scan(lib, 0)
    np.testing.assert_array_equal(got, expected)


def test_tile_id_from_block_index_deadlocks_in_reverse(lib: SimtLibrary) -> None:
    got, expected = compact(lib, 1, Omit.TILE_COUNTER)
    np.testing.assert_array_equal(got, expected)  # in order it is right: that is the trap
    lib.schedule(reverse=True, resident_blocks=2)
    with pytest.raises(RuntimeError, match=r"deadlock \(endless spin\): .*samples.cu:\d+"):
        compact(lib, 1, Omit.TILE_COUNTER)


def test_deadlock_on_two_os_threads_is_named(lib: SimtLibrary) -> None:
    lib.schedule(threads=2)
    with pytest.raises(RuntimeError, match="deadlock"):
        lib.call("ff_planted_bug", "lock_never_released", np.ones(64, np.int32), 64)


def test_missing_barrier_gives_a_wrong_result(lib: SimtLibrary) -> None:
    results = set()
    for schedule in schedules(NUM_SEEDS):
        schedule.apply(lib)
        got, expected = block_scan(lib, 0, Omit.BARRIER)
        assert not np.array_equal(got, expected), f"{schedule} hides the missing barrier"
        results.add(got.tobytes())
    assert len(results) > 1


def test_missing_syncwarp_gives_a_wrong_result(lib: SimtLibrary) -> None:
    got, expected = SAMPLES["swap_neighbours"](lib, 0, Omit.SYNC_WARP)
    assert not np.array_equal(got, expected)


def test_unknown_name_is_an_error(lib: SimtLibrary) -> None:
    with pytest.raises(RuntimeError, match="no planted bug is called nothing"):
        lib.call("ff_planted_bug", "nothing", None, 0)


def test_noncontiguous_array_is_refused(lib: SimtLibrary) -> None:
    with pytest.raises(ValueError, match="arrays must be contiguous; got strides"):
        lib.call("ff_planted_bug", "two_barriers", np.zeros((8, 8), np.int32)[:, ::2], 32)


# --- sanitizers ---


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizer_is_silent_on_correct_kernels(folder: Path, mode: str) -> None:
    library = sanitized_library(folder, mode)
    num_seeds = NUM_SANITIZER_SEEDS[mode]
    result = run_samples(mode, library, str(num_seeds))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{num_seeds * len(SAMPLES)} runs are right\n"
    assert "Sanitizer" not in result.stderr


@pytest.mark.parametrize("bug", NAMED_BY_ASAN)
def test_asan_names_bug(folder: Path, bug: str) -> None:
    result = run_samples("asan", sanitized_library(folder, "asan"), "--bug", bug)
    assert result.returncode != 0
    assert NAMED_BY_ASAN[bug] in result.stderr
    assert "planted_bugs.cu:" in result.stderr  # the kernel's line


@pytest.mark.parametrize("arguments", NAMED_BY_TSAN, ids=" ".join)
def test_tsan_names_race(folder: Path, arguments: tuple[str, ...]) -> None:
    result = run_samples("tsan", sanitized_library(folder, "tsan"), "4", *arguments)
    assert result.returncode == 66, result.stderr
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert ".cu:" in result.stderr
