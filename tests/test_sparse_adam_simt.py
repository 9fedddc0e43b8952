"""The shipped CUDA kernel csrc/sparse_adam.cu, executed on the CPU, against the C++ step.

`fishfast.AdamW` runs as it is; only the extension under it is exchanged for one that hands the same
table of rows to the simulated kernel. Everything must agree bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simt.build import CSRC, HERE, build
from simt.library import SimtLibrary
from simt.sparse_step_backend import SimulatedExtension, simulate
from torch import nn

import fishfast as ff
from fishfast import sparse_adam, sparse_rows

_SOURCES = [CSRC / "sparse_adam.cu", HERE / "sparse_adam_api.cpp"]
# One entry, a warp and its neighbours, one chunk of 1,024 and its neighbours, several chunks.
_SHAPES = [(1,), (31,), (33,), (1024,), (1025,), (67, 61)]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    return SimtLibrary(build(_SOURCES, tmp_path_factory.mktemp("simt") / "sparse_adam.so"))


def _train(dtype: torch.dtype, steps: int, layout: str = "contiguous", **options: Any) -> list:
    """A few steps on random gradients; returns every tensor that a step may write."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(shape) for shape in [*_SHAPES, (8, 5, 3, 3)]]).to(dtype)
    if layout == "channels_last":
        model[-1].data = model[-1].data.to(memory_format=torch.channels_last)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.6, seed=0, keep=["3", "4"]))
    make = options.pop("make", ff.AdamW)
    optimizer = make(tuned.parameters(), backend="cpu", **options)
    for step in range(steps):
        for position, parameter in enumerate(tuned.parameters()):
            # Parameters take part in different steps, so their bias corrections differ.
            skipped = step % 3 == position % 3
            parameter.grad = None if skipped else torch.randn_like(parameter)
        optimizer.step()
    states = [state for state in optimizer.state.values()]
    return [*model.parameters(), *(value for state in states for value in state.values())]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, library: SimtLibrary) -> SimulatedExtension:
    return simulate(monkeypatch, library, "sparse_adam", sparse_adam._ROW_DTYPE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
        {"lr": 1e-3, "betas": (0.3, 0.5)},
        {"lr": 1e-2, "amsgrad": True, "betas": (0.9, 0.5)},
        {"lr": 1e-2, "make": ff.Adam, "weight_decay": 0.1},
    ],
    ids=["default", "decay+maximize", "small betas", "amsgrad", "Adam, L2"],
)
@pytest.mark.parametrize("dtype", _DTYPES.values(), ids=_DTYPES)
def test_simulated_kernel_equals_the_cpp_step(
    dtype: torch.dtype,
    options: dict[str, Any],
    layout: str,
    library: SimtLibrary,
    request: pytest.FixtureRequest,
) -> None:
    expected = _train(dtype, 4, layout, **options)
    simulated = request.getfixturevalue("simulated")
    library.schedule(seed=0)
    got = _train(dtype, 4, layout, **options)
    assert simulated.launches == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_same_bits_under_forty_schedules(
    library: SimtLibrary, simulated: SimulatedExtension
) -> None:
    library.schedule(seed=0)
    expected = _train(torch.bfloat16, 2, lr=1e-2, amsgrad=True)
    for seed in range(1, 41):
        library.schedule(seed=seed, resident_blocks=1 + seed % 4, reverse=seed % 2 == 1)
        got = _train(torch.bfloat16, 2, lr=1e-2, amsgrad=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), seed


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_kernel_is_clean_under_sanitizers(mode: str, tmp_path: Path) -> None:
    """Out-of-bounds accesses, misalignment, overflow (asan) and races (tsan) would end the run."""
    library = build(_SOURCES, tmp_path / f"{mode}.so", mode=mode)
    runner = [sys.executable, str(HERE / "run.py"), mode]
    path = f"{HERE.parent}{os.pathsep}{HERE.parents[1]}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*runner, __file__, str(library)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "clean" in result.stdout


def _bare_launches(path: str) -> None:
    """Tables of numpy arrays, whose memory comes from malloc and so has a sanitizer's red zones."""
    library = SimtLibrary(path)
    rng = np.random.default_rng(0)
    for seed in range(4):
        library.schedule(seed=seed, resident_blocks=1 + seed, reverse=seed % 2 == 1)
        counts = [1, 33, 1025]
        rows = np.zeros(len(counts), sparse_adam._ROW_DTYPE)
        held = []
        for row, k in zip(rows, counts, strict=True):
            weight = rng.standard_normal(2 * k).astype(np.float32)
            offsets = np.sort(rng.permutation(2 * k)[:k]).astype(np.int32)
            streams = [np.abs(rng.standard_normal(k)).astype(np.float32) for _ in range(4)]
            held += [weight, offsets, *streams]
            row["target"] = (weight.ctypes.data, offsets.ctypes.data, 0, 0)
            for name, stream in zip(
                ("grad", "values", "exp_avg", "exp_avg_sq"), streams, strict=True
            ):
                row[name] = stream.ctypes.data
            row["k"] = k
            row["scalars"] = (0.1, 0.999, 0.001, 1e-8, 1.0, -1e-3, 0.03, 1.0, 1.0, 0.0)
        table = [(start, r) for r, k in enumerate(counts) for start in range(0, k, 1024)]
        chunks = np.array(table, sparse_rows.CHUNK_DTYPE)
        library.call("ff_sparse_adam", rows.view(np.uint8), chunks.view(np.uint8), len(chunks))
    print("clean")


if __name__ == "__main__":
    _bare_launches(sys.argv[1])
