"""The rules that let one CUDA source run on a card and on the simulator, enforced by reading."""

from __future__ import annotations

import re

import pytest
from simt.build import CSRC

_FILES = sorted(path for path in CSRC.iterdir() if path.suffix in {".cu", ".cuh", ".h", ".cpp"})
_KERNELS = [path for path in _FILES if path.suffix in {".cu", ".cuh"}]
# What differs between nvcc and the simulator, and so may stand in platform.cuh only.
_MACHINE = re.compile(
    r"<<<|\basm\b|__shared__|\bvolatile\b|__activemask|#include <(cuda|cub|cooper)"
)


def _code(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_the_folder_was_read() -> None:
    assert {"platform.cuh", "sparse_adam.cu"} <= {path.name for path in _KERNELS}


@pytest.mark.parametrize("path", _KERNELS, ids=lambda path: path.name)
def test_machine_dependent_code_is_in_platform_cuh(path: pytest.Function) -> None:
    found = _MACHINE.findall(_code(path.read_text()))
    assert bool(found) == (path.name == "platform.cuh"), found


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_no_torch_and_pybind11_in_one_file(path: pytest.Function) -> None:
    code = _code(path.read_text())
    assert not re.search(r"#include [<\"](torch|ATen|c10)", code)
    assert ("pybind11" in code) == (path.name == "bindings.cpp")


@pytest.mark.parametrize("path", _KERNELS, ids=lambda path: path.name)
def test_every_launch_is_checked(path: pytest.Function) -> None:
    """FF_LAUNCH checks; a bare cudaLaunchKernel would not."""
    assert "cudaLaunch" not in _code(path.read_text())
