"""Deltas are saved whole or not at all: after a failure or a kill the old file is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import HANG_GUARD

import fishfast as ff
from fishfast.files import safetensors_file as _safetensors


@pytest.mark.parametrize("failing", ["write_tensors", "chmod", "fsync", "replace"])
def test_failure_while_saving_keeps_the_old_file(
    path: Path, tuned: ff.SparseTuning, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(_safetensors if failing == "write_tensors" else os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        ff.save_delta(tuned, path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_order_of_the_atomic_save(
    path: Path, tuned: ff.SparseTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append(("fsync", "folder" if name == str(path.parent) else "file"))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        assert Path(source).parent == path.parent  # a rename across file systems is no rename
        assert ff.load_delta(source).num_selected == tuned.num_selected  # whole before it counts
        seen.append(("replace", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    ff.save_delta(tuned, path)
    assert seen == [("fsync", "file"), ("replace", path.name), ("fsync", "folder")]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tuned: ff.SparseTuning, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        ff.save_delta(tuned, tmp_path / "d")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o666 & ~umask


# Runs in its own process, which forks a child per kill: forking pytest's would copy its threads.
KILLER = """
import os, random, signal, sys, time
import torch
import fishfast as ff
from fishfast.files import safetensors_file as _safetensors

torch.set_num_threads(1)
target = sys.argv[1]
tunings = []
for k in (200_000, 300_000):
    model = torch.nn.Linear(1000, 1000)
    tunings.append(ff.train_only(model, ff.random_mask(model, k=k, seed=0)))
whole = (200_000, 300_000)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killing(module, name, call, after):
    real, count = getattr(module, name), [0]

    def patched(*arguments, **options):
        count[0] += 1
        if count[0] == call and not after:
            die()
        result = real(*arguments, **options)
        if count[0] == call and after:
            die()
        return result

    setattr(module, name, patched)


def run(child, delay=None):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


points = [(_safetensors, "write_tensors", 1), (os, "chmod", 1), (os, "fsync", 1),
          (os, "replace", 1), (os, "fsync", 2)]
for module, name, call in points:
    for after in (False, True):
        ff.save_delta(tunings[0], target)

        def child():
            killing(module, name, call, after)
            ff.save_delta(tunings[1], target)

        run(child)
        replaced = (name, call) == ("fsync", 2) or (name == "replace" and after)
        assert ff.load_delta(target).num_selected == whole[replaced], (name, call, after)

def loop():
    while True:
        for tuned in tunings:
            ff.save_delta(tuned, target)

start = time.perf_counter()
for tuned in tunings:
    ff.save_delta(tuned, target)
window = 2 * (time.perf_counter() - start)  # four saves: kills fall into each, on any machine

random.seed(0)
seen, kills = set(), 0
while kills < int(sys.argv[2]) or len(seen) < 2:
    kills += 1
    if kills > int(sys.argv[2]):
        window *= 1.1  # the machine has become slower since it was measured
    run(loop, delay=random.uniform(0.0, window))
    found = ff.load_delta(target).num_selected
    assert found in whole, found
    seen.add(found)
print("killed", 2 * len(points), sorted(seen))
"""


def test_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "d"), "40"],
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "killed 10 [200000, 300000]\n"
