"""bench/run_gpu.sh run twice, cut short, and with its files in odd places."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from gpu_script import Script
from processes import HANG_GUARD, let_processes_hear_ctrl_c, wait_for


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_what_is_done_is_not_repeated(script: Script) -> None:
    script.out = script.root / "bench" / "out [1] of me"  # its files are no sources
    script("--only", "build,hashes")
    assert script.summary()["tests"] == "not selected"
    result = script()
    assert "build     ok: done before" in result.stdout
    assert script.calls("pip install") == script.calls("fingerprints.py") == 0
    assert script.calls("bench/report.py") == 1
    script("--only", "build")  # named: again
    assert script.calls("pip install") == 1
    script("--only", "bench")  # what is drawn from it is no longer right
    script()
    assert (script.calls("--benchmark-json"), script.calls("bench/report.py")) == (0, 1)
    script("--again")
    assert (script.calls("pip install"), script.calls("fingerprints.py run")) == (1, 2)


def test_changed_sources_are_not_taken_for_done(script: Script) -> None:
    script("--only", "build")
    (script.root / "csrc" / "new.cu").write_text("// changed")
    script()
    assert script.calls("pip install") == 1
    (script.root / "fishfast" / "_C.so").unlink()  # `make clean`
    script()
    assert script.calls("pip install") == 1


def test_a_part_that_does_not_end_is_ended(script: Script) -> None:
    slow = {"SLOW": "fingerprints.py run cpu", "LATE": "gpu_parts.sh hashes"}
    result = script("--only", "hashes,report", "--minutes", "30", **slow)
    assert result.returncode == 1
    assert re.search(r"hashes    failed: not done after \d+ s; 2 passed; see", result.stdout)
    # 40 of 60 shares, of what is left of the 30 minutes.
    called = script.log.with_suffix(".limits").read_text()
    (limit,) = re.findall(r"--kill-after=20 (\d+) \S+ bench/gpu_parts.sh hashes", called)
    assert 0 < int(limit) <= 1200
    assert not (script.out / "hashes.done").exists()


def test_ctrl_c_ends_the_part_in_hand_and_the_next_run_goes_on(script: Script) -> None:
    let_processes_hear_ctrl_c()
    process = script.start("--only", "build,hashes,bench", SLOW="fingerprints.py run cpu")
    wait_for(lambda: script.calls("fingerprints.py run cpu") or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=HANG_GUARD)
    assert process.returncode == 130
    summary = (script.out / "summary.txt").read_text()
    assert re.search(r"hashes    failed: interrupted after \d+ s; 2 passed\n", summary)
    assert "bench     not reached" in summary
    result = script()
    assert result.returncode == 0
    assert "build     ok: done before" in result.stdout
    assert script.calls("fingerprints.py run cpu") == 1


def test_another_folder_for_logs_leaves_few_files(script: Script, tmp_path: Path) -> None:
    work = ("--work", str(tmp_path / "a folder"))
    script(*work)
    assert {f.name for f in script.out.iterdir()} == {
        "summary.txt", "bench.json", "training.png", "results.tar.gz",
    }  # fmt: skip
    assert (tmp_path / "a folder" / "build.done").exists()
    script("--only", "bench", *work, BROKEN="--benchmark-json")
    assert {f.name for f in script.out.iterdir()} == {"summary.txt", "results.tar.gz"}  # no old one


@pytest.mark.parametrize(
    ("place", "words"),
    [("repo/setup.py", "no such folder can be made"), ("repo/bench", "has the sources")],
)
def test_a_folder_that_cannot_be_taken_is_refused(script: Script, place: str, words: str) -> None:
    script.out = script.root.parent / place
    result = script()
    assert result.returncode == 2
    assert words in result.stderr
    assert script.calls("") == 0
