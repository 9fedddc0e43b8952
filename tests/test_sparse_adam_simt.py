"""The shipped CUDA kernel csrc/sparse_adam.cu, executed on the CPU, against the C++ step.

`fishfast.AdamW` runs as it is; only the extension under it is exchanged for one that hands the same
table of rows to the simulated kernel. Everything must agree bit for bit. test_simt_kernels.py runs
the kernel alone, under every schedule and sanitizer.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from simt.build import CSRC, HERE, build
from simt.library import SimtLibrary
from simt.schedules import schedules
from torch import nn

import fishfast as ff
from fishfast import _backend, sparse_adam

_SOURCES = [CSRC / "sparse_adam.cu", HERE / "sparse_adam_api.cpp"]
# One entry, a warp and its neighbours, one chunk of 1,024 and its neighbours, several chunks.
_SHAPES = [(1,), (31,), (33,), (1024,), (1025,), (67, 61)]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class SimulatedExtension:
    """Stands in for fishfast._C: the CPU entry runs the CUDA kernel on simulated threads."""

    SPARSE_ADAM_ROW_BYTES = sparse_adam._ROW_DTYPE.itemsize

    def __init__(self, library: SimtLibrary) -> None:
        self.library = library
        self.launches = 0

    def sparse_adam_cpu(self, rows: int, num_rows: int, num_threads: int) -> None:
        size = num_rows * self.SPARSE_ADAM_ROW_BYTES
        table = np.frombuffer((ctypes.c_char * size).from_address(rows), sparse_adam._ROW_DTYPE)
        entries = _backend.compiled_for_real().ADAM_ENTRIES_PER_CHUNK
        counts = tuple(int(k) for k in table["k"])
        chunks = sparse_adam._chunk_table(counts, entries, torch.device("cpu"))
        num_chunks = chunks.numel() // sparse_adam._CHUNK_DTYPE.itemsize
        self.library.call("ff_sparse_adam", table.view(np.uint8), chunks, num_chunks)
        self.launches += 1


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
    optimizer = ff.AdamW(tuned.parameters(), backend="cpu", **options)
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
    extension = SimulatedExtension(library)
    monkeypatch.setattr(_backend, "compiled_for_real", _backend.compiled, raising=False)
    monkeypatch.setattr(_backend, "compiled", lambda: extension)
    return extension


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
        {"lr": 1e-3, "betas": (0.3, 0.5)},
    ],
    ids=["default", "decay+maximize", "small betas"],
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
    expected = _train(torch.bfloat16, 2, lr=1e-2)
    for schedule in schedules(40):
        schedule.apply(library)
        got = _train(torch.bfloat16, 2, lr=1e-2)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), schedule
