"""The shipped CUDA kernel csrc/sparse_sgd.cu, executed on the CPU, against the C++ step.

`fishfast.SGD` runs as it is; only the extension under it is exchanged for one that hands the same
table of rows to the simulated kernel. Everything must agree bit for bit. test_simt_kernels.py runs
the kernel alone, under every schedule and sanitizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simt.build import CSRC, HERE, build
from simt.library import SimtLibrary
from simt.schedules import schedules
from simt.sparse_step_backend import SimulatedExtension, simulate
from torch import nn

import fishfast as ff
from fishfast import sparse_sgd

# One entry, a warp and its neighbours, one chunk of 1,024 and its neighbours, several chunks.
_SHAPES = [(1,), (31,), (33,), (1024,), (1025,), (67, 61)]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    sources = [CSRC / "sparse_sgd.cu", HERE / "sparse_sgd_api.cpp"]
    return SimtLibrary(build(sources, tmp_path_factory.mktemp("simt") / "sparse_sgd.so"))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, library: SimtLibrary) -> SimulatedExtension:
    return simulate(monkeypatch, library, "sparse_sgd", sparse_sgd._ROW_DTYPE)


def _train(dtype: torch.dtype, steps: int, layout: str = "contiguous", **options: Any) -> list:
    """A few steps on random gradients; returns every tensor that a step may write."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(shape) for shape in [*_SHAPES, (8, 5, 3, 3)]]).to(dtype)
    if layout == "channels_last":
        model[-1].data = model[-1].data.to(memory_format=torch.channels_last)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.6, seed=0, keep=["3", "4"]))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1, backend="cpu", **options)
    for step in range(steps):
        for position, parameter in enumerate(tuned.parameters()):
            # Parameters take part in different steps, so their first steps differ.
            skipped = step % 3 == position % 3
            parameter.grad = None if skipped else torch.randn_like(parameter)
        optimizer.step()
    states = [state for state in optimizer.state.values()]
    return [*model.parameters(), *(value for state in states for value in state.values())]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.7, "nesterov": True, "maximize": True},
    ],
    ids=["plain", "dampening+decay", "nesterov+maximize"],
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
    expected = _train(torch.bfloat16, 2, momentum=0.9, weight_decay=0.1)
    for schedule in schedules(40):
        schedule.apply(library)
        got = _train(torch.bfloat16, 2, momentum=0.9, weight_decay=0.1)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), schedule
