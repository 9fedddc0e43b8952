"""bench/harness.py and conftest.py: no figure on a red check, and what has none is named."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import HANG_GUARD

BENCH = Path(__file__).resolve().parents[1] / "bench"
CPU = torch.device("cpu")

BENCH_FILE = """
import pytest, torch
from harness import record, skip

CPU = torch.device("cpu")

def right():
    return 1e-7

def wrong():
    assert 3 == 4, "got 3, expected 4"

@pytest.mark.parametrize("size", [10, 1000])
@pytest.mark.parametrize("contender", ["fishfast", "slow", "absent", "broken"])
def bench_sum(benchmark, contender, size):
    if contender == "absent":
        skip("needs peft, not installed", contender, case=f"n={size}")
    x = torch.ones(size)
    record(
        benchmark, x.sum, CPU, x.nbytes, flops=size, floor=x.clone, floor_name="a copy",
        gate=wrong if contender == "broken" else right, case=f"n={size}", num_params=size,
        contender=contender,
    )

def bench_nothing(benchmark):
    pytest.skip("not today")
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FISHFAST_BENCH", "toy")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("harness")


def benchmark() -> Any:
    return SimpleNamespace(
        name="bench_x[1]", extra_info={}, pedantic=lambda call, args=(), **_: call(*args)
    )


def test_a_red_check_is_raised_before_anything_is_timed(harness: Any, capsys: Any) -> None:
    def check() -> None:
        raise AssertionError("3 is not 4")

    case, calls = benchmark(), []
    with pytest.raises(
        harness.WrongResult, match="^planted on n=3 is wrong: 3 is not 4; no figure$"
    ):
        harness.record(
            case, lambda: calls.append(1), CPU, 8, gate=check, contender="planted", case="n=3"
        )
    assert (case.extra_info, calls, capsys.readouterr().out) == ({}, [], "")


def test_what_a_figure_carries(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        harness, "compare",
        lambda run, floor, device: {
            "median_us": 50.0, "p20_us": 40.0, "p80_us": 60.0, "floor_us": 10.0, "times_floor": 5.0,
        },
    )  # fmt: skip
    case = benchmark()
    harness.record(
        case, lambda: torch.ones(2**18), CPU, 10**6, flops=2 * 10**6, floor=lambda: None,
        gate=lambda: 1e-6, density=0.5,
    )  # fmt: skip
    info = case.extra_info
    assert info.pop("peak_bytes") == pytest.approx(2**20, abs=2**10)
    assert info == {
        "median_us": 50.0, "p20_us": 40.0, "p80_us": 60.0, "floor_us": 10.0, "times_floor": 5.0,
        "percent_of_floor": 20.0, "bytes": 10**6, "gb_per_s": 20.0, "flops": 2 * 10**6,
        "tflop_per_s": 0.04, "relative_error": 1e-6, "floor_name": "its floor", "density": 0.5,
    }  # fmt: skip


def test_each_turn_is_held_against_its_own_floor(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns in which the machine is slow change the times, not the ratio."""
    clock, slow = importlib.import_module("clock"), [0]

    def time(run: Any) -> float:
        slow[0] += 1
        return run() * (3.0 if slow[0] % 8 in (3, 4) else 1.0)

    monkeypatch.setattr(clock, "_time_cpu", time)
    timing = clock.compare(lambda: 2e4, lambda: 1e4, CPU, 1.0)
    assert timing == {
        "median_us": 2e4, "p20_us": 2e4, "p80_us": 6e4, "floor_us": 1e4,
        "times_floor": 2.0, "times_floor_p20": 2.0, "times_floor_p80": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("bytes_beyond", [0, 16])
def test_floors_move_what_they_say(
    harness: Any, monkeypatch: pytest.MonkeyPatch, bytes_beyond: int
) -> None:
    floors = importlib.import_module("floors")
    monkeypatch.setattr(floors, "_PIECE", 1000)
    num_bytes = 2 * 4 * 1000 * 3 + bytes_beyond
    sums = floors.read_of(num_bytes, CPU)()
    assert float(sum(sums)) == num_bytes // 4
    copied: list[int] = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other: (copied.append(len(other)), copy_(self, other))
    )
    floors.copy_of(num_bytes, CPU)()
    assert sum(copied) == num_bytes // 8


def test_without_a_floor_its_bytes_are_copied(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "copy_of", lambda num_bytes, device: f"{num_bytes} on {device}")
    monkeypatch.setattr(
        harness, "compare",
        lambda run, floor, device: {"median_us": 70.0, "times_floor": 2.0, "floor": floor},
    )  # fmt: skip
    case = benchmark()
    harness.record(case, lambda: None, CPU, 3500)
    info = case.extra_info
    assert (info["floor"], info["floor_name"]) == ("3500 on cpu", "its bytes, copied")


@pytest.mark.parametrize("us", [1e3, 1e5, 3e6])
def test_repeats_follow_the_time(harness: Any, us: float) -> None:
    """Sixty of what is fast, at the least three of what is slow, no warm-up of what takes long."""
    clock = importlib.import_module("clock")
    calls: list[int] = []

    def time(run: Any) -> float:
        calls.append(1)
        return us

    repeats = clock._warm_up([lambda: None], time, 1.0)
    assert (repeats, len(calls)) == {1e3: (60, 3), 1e5: (10, 3), 3e6: (3, 1)}[us]


def run_bench(folder: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """Run a bench file beside copies of the shared modules; return its JSON and its output."""
    for name in ("conftest", "harness", "clock", "figures", "floors", "machine"):
        shutil.copy(BENCH / f"{name}.py", folder)
    (folder / "bench_sample.py").write_text(BENCH_FILE)
    config = "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n"
    (folder / "pytest.ini").write_text(config)
    # Not as a worker of a parallel run, in which pytest-benchmark measures nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-q", "--benchmark-enable",
         "--benchmark-json=figures.json", "-p", "no:cacheprovider"],
        cwd=folder, capture_output=True, text=True, timeout=HANG_GUARD,
        env={**inherited, "PYTHONPATH": str(BENCH.parent), "FISHFAST_BENCH": "toy", **environment},
    )  # fmt: skip
    file = folder / "figures.json"
    return json.loads(file.read_text()) if file.exists() else {}, result.stdout + result.stderr


def test_a_run_keeps_figures_and_names_what_has_none(tmp_path: Path) -> None:
    content, output = run_bench(tmp_path, FISHFAST_COMMIT="abc1234")
    assert content.keys() == {"machine", "benchmarks", "skipped", "failed"}
    # The contenders of a case one after the other, whatever the order of the decorators.
    assert [(f["case"], f["contender"]) for f in content["benchmarks"]] == [
        ("n=10", "fishfast"), ("n=10", "slow"), ("n=1000", "fishfast"), ("n=1000", "slow"),
    ]  # fmt: skip
    figure = content["benchmarks"][3]
    assert figure["stage"] == "sample"
    assert figure["num_params"] == 1000
    assert figure["version"] == f"torch {torch.__version__}"
    assert content["benchmarks"][0]["version"].startswith("fishfast ")
    absent = {"stage": "sample", "case": "n=10", "contender": "absent",
              "reason": "needs peft, not installed"}  # fmt: skip
    assert absent.items() <= content["skipped"][0].items()
    assert content["skipped"][-1]["reason"] == "not today"
    assert [f["contender"] for f in content["failed"]] == ["broken", "broken"]
    assert "broken on n=10 is wrong: got 3, expected 4" in content["failed"][0]["reason"]
    assert content["machine"]["commit"] == "abc1234"
    assert content["machine"]["rehearsal"] is True
    assert "extension" not in content["machine"]["fishfast"]  # a path
    assert 0 <= content["machine"]["others_percent"] <= 100
    printed = [" ".join(line.split()) for line in output.splitlines()]
    assert len([line for line in printed if " us " in line]) == 4
    assert not any(" us " in line for line in printed if line.startswith("broken "))
    assert "absent, n=10: skipped: needs peft, not installed" in printed
    assert any(
        line.startswith("broken, size 10: FAILED: harness.WrongResult: broken on n=10 is wrong")
        for line in printed
    )


def conftest_module() -> Any:
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return conftest


@pytest.mark.parametrize(
    ("variable", "given", "line"),
    [("FISHFAST_BENCH", "large", "FISHFAST_BENCH must be one of toy, cpu, gpu, full; got 'large'")]
    + [
        ("FISHFAST_BENCH_SECONDS", given, "FISHFAST_BENCH_SECONDS must be a number of seconds above"
         f" 0; got '{given}'; unset it to measure everything")
        for given in ("soon", "nan", "inf", "-5", "0")
    ],
)  # fmt: skip
def test_a_wrong_variable_ends_the_run_with_a_line(
    harness: Any, monkeypatch: pytest.MonkeyPatch, variable: str, given: str, line: str
) -> None:
    monkeypatch.setenv(variable, given)
    with pytest.raises(pytest.UsageError) as raised:
        conftest_module().pytest_configure(SimpleNamespace(stash={}))
    assert str(raised.value) == line


def test_a_run_without_a_figure_keeps_what_has_none(harness: Any, tmp_path: Path) -> None:
    conftest, file = conftest_module(), tmp_path / "figures.json"
    run, entry = conftest._Run(), {"stage": "sample", "case": "n=1", "contender": "fishfast"}
    session = SimpleNamespace(config=SimpleNamespace(
        stash={conftest._STATE: run}, getoption=lambda name, default: file
    ))  # fmt: skip
    conftest.pytest_sessionfinish(session)
    assert not file.exists()  # nothing ran
    run.skipped, run.failed = [{**entry, "reason": "no time left"}], [{**entry, "reason": "wrong"}]
    conftest.pytest_sessionfinish(session)
    content = json.loads(file.read_text())
    assert (content["benchmarks"], content["skipped"]) == ([], run.skipped)
    assert content["failed"] == run.failed
    assert content["machine"]["rehearsal"] is True
    file.unlink()
    conftest.pytest_benchmark_update_json(session.config, {"benchmarks": []})
    conftest.pytest_sessionfinish(session)
    assert not file.exists()  # pytest-benchmark writes it


def test_each_file_has_its_share_of_the_time(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one leaves, those after it have; what the first takes too long, they do not lose."""
    monkeypatch.setenv("FISHFAST_BENCH_SECONDS", "90")
    conftest = conftest_module()
    run = conftest._Run()
    files = ["sparse_adam", "topk_mask", "masked_grad"]
    monkeypatch.setattr(conftest, "_SHARES", dict.fromkeys(files, 3))
    run.counts, run.start = dict.fromkeys(files, 5), 1000.0
    for now, spent in ((29.0, []), (31.0, ["sparse_adam"]), (61.0, files[:2]), (91.0, files)):
        monkeypatch.setattr(conftest.time, "monotonic", lambda now=now: 1000 + now)
        assert [file for file in files if run.spent(file)] == spent
    monkeypatch.delenv("FISHFAST_BENCH_SECONDS")
    assert not conftest._Run().spent("anything")


def test_a_comparison_is_not_cut_in_half(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file's share may end in the middle; the whole time may not."""
    monkeypatch.setenv("FISHFAST_BENCH_SECONDS", "90")
    conftest = conftest_module()
    run = conftest._Run()
    run.counts, run.start = dict.fromkeys(["topk_mask", "masked_grad"], 5), 1000.0
    monkeypatch.setattr(conftest, "_SHARES", {"topk_mask": 1, "masked_grad": 1})
    skipped = []
    for now, case in ((1, "a"), (44, "b"), (46, "b"), (47, "c"), (48, "c"), (91, "c")):
        monkeypatch.setattr(conftest.time, "monotonic", lambda now=now: 1000.0 + now)
        skipped.append(run.no_time("topk_mask", case))
    assert skipped == [False, False, False, True, True, True]
    monkeypatch.setattr(conftest.time, "monotonic", lambda: 1060.0)
    assert not run.no_time("masked_grad", "d")
    monkeypatch.setattr(conftest.time, "monotonic", lambda: 1091.0)
    assert run.no_time("masked_grad", "d")


def test_what_readme_carries_runs_first(harness: Any) -> None:
    conftest = conftest_module()
    files = {f.stem.removeprefix("bench_") for f in BENCH.glob("bench_*.py")}
    tables = set(importlib.import_module("readme_tables")._STAGES)
    assert set(list(conftest._SHARES)[: len(tables)]) == tables
    assert set(conftest._SHARES) == files
