"""The CUDA kernels compile for old and new cards without spilling a register."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simt.build import CSRC
from simt.check import shipped_stems

# The oldest of CMakeLists.txt, with the fewest registers per thread in use, and the measured one.
_ARCHITECTURES = (75, 90)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("stem", shipped_stems())
def test_no_kernel_spills_or_has_a_stack(stem: str, tmp_path: Path) -> None:
    source = CSRC / f"{stem}.cu"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in _ARCHITECTURES]
    command = ["nvcc", "-std=c++17", "-fatbin", "-Xptxas", "-v", *targets, str(source)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels")], capture_output=True, text=True, check=True
    )
    usages = re.findall(r"\d+ bytes stack frame, .*", result.stderr)
    assert len(usages) % len(_ARCHITECTURES) == 0
    assert set(usages) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
