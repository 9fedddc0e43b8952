"""setup.py builds again where an earlier build left its traces."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

_SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    """Return a function that configures a small project's build with setup.py's own."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    configure_build = runpy.run_path(str(_SETUP))["configure_build"]
    cmake = shutil.which("cmake")
    assert cmake, "cmake is one of the test packages"

    def run(source: Path) -> None:
        options = ["-S", str(source), "-G", "Ninja"]
        configure_build(cmake, source / "build", options, dict(os.environ))

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    text = "cmake_minimum_required(VERSION 3.24)\nproject(small NONE)\n"
    (folder / "CMakeLists.txt").write_text(text)
    return folder


def test_a_ninja_that_is_gone(configure: Callable[[Path], None], project: Path) -> None:
    """As after a second `pip install .` of the same checkout."""
    configure(project)
    cache = project / "build" / "CMakeCache.txt"
    ninja = shutil.which("ninja") or ""
    before = cache.read_text()
    assert f"CMAKE_MAKE_PROGRAM:FILEPATH={ninja}\n" in before
    cache.write_text(before.replace(ninja, "/gone/bin/ninja"))
    configure(project)
    assert "/gone" not in cache.read_text()


def test_a_checkout_that_was_moved(configure: Callable[[Path], None], project: Path) -> None:
    configure(project)
    moved = project.rename(project.with_name("moved"))
    configure(moved)
    assert (
        f"CMAKE_HOME_DIRECTORY:INTERNAL={moved}\n" in (moved / "build/CMakeCache.txt").read_text()
    )


@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_a_broken_project_is_an_error(
    configure: Callable[[Path], None], project: Path, before: bool
) -> None:
    if before:
        configure(project)
    (project / "CMakeLists.txt").write_text("message(FATAL_ERROR broken)")
    with pytest.raises(subprocess.CalledProcessError):
        configure(project)
