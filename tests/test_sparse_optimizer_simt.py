"""The shipped kernels of a step, executed, against the C++ step.

They are csrc/sparse_adam.cu, csrc/sparse_sgd.cu and, for other optimizers, csrc/write_values.cu.
The optimizers run as they are; the tables that they make go to the simulated kernels. Everything
must agree bit for bit. test_simt_kernels.py runs the kernels alone, under every schedule and
sanitizer; test_capturable_simt.py has the steps of a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simt.library import SimtLibrary
from simt.schedules import schedules
from simt.sparse_step_backend import BACKEND, SimulatedExtension
from stepping import random_tensors, same_bits, some_indices, tune
from torch import nn

import fishfast as ff
from fishfast import _backend

# One entry, a warp and its neighbours, one chunk of 1,024 and its neighbours, several chunks.
_SHAPES = [(1,), (31,), (33,), (1024,), (1025,), (67, 61)]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (ff.AdamW, {"lr": 1e-2}),
    "AdamW, decay+maximize": (ff.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
    "AdamW, small betas": (ff.AdamW, {"lr": 1e-3, "betas": (0.3, 0.5)}),
    "AdamW, amsgrad": (ff.AdamW, {"lr": 1e-2, "amsgrad": True, "betas": (0.9, 0.5)}),
    "Adam, L2": (ff.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (ff.SGD, {"lr": 0.1}),
    "SGD, dampening+decay": (
        ff.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    ),
    "SGD, nesterov+maximize": (
        ff.SGD,
        {"lr": 0.1, "momentum": 0.7, "nesterov": True, "maximize": True},
    ),
}


def _train(
    case: str, backend: str, dtype: torch.dtype, steps: int, layout: str = "contiguous"
) -> list:
    """A few steps on random gradients; returns every tensor that a step may write."""
    make, options = _CASES[case]
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(shape) for shape in [*_SHAPES, (8, 5, 3, 3)]]).to(dtype)
    if layout == "channels_last":
        model[-1].data = model[-1].data.to(memory_format=torch.channels_last)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.6, seed=0, keep=["3", "4"]))
    optimizer = make(tuned.parameters(), backend=backend, **options)
    for step in range(steps):
        for position, parameter in enumerate(tuned.parameters()):
            # Parameters take part in different steps, so their counts and first steps differ.
            skipped = step % 3 == position % 3
            parameter.grad = None if skipped else torch.randn_like(parameter)
        optimizer.step()
    states = [state for state in optimizer.state.values()]
    return [*model.parameters(), *(value for state in states for value in state.values())]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", _DTYPES.values(), ids=_DTYPES)
@pytest.mark.parametrize("case", _CASES)
def test_simulated_kernel_equals_the_cpp_step(
    case: str, dtype: torch.dtype, layout: str, simulated_steps: SimulatedExtension
) -> None:
    expected = _train(case, "cpu", dtype, 4, layout)
    assert simulated_steps.launches == 0
    got = _train(case, BACKEND, dtype, 4, layout)
    assert simulated_steps.launches == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("case", ["AdamW, amsgrad", "SGD, dampening+decay"])
def test_same_bits_under_forty_schedules(
    case: str, step_library: SimtLibrary, simulated_steps: SimulatedExtension
) -> None:
    expected = _train(case, BACKEND, torch.bfloat16, 2)
    for schedule in schedules(40):
        schedule.apply(step_library)
        got = _train(case, BACKEND, torch.bfloat16, 2)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), schedule


@pytest.mark.parametrize("dtype", _DTYPES.values(), ids=_DTYPES)
def test_what_another_optimizer_stepped_is_written_in_one_launch(
    dtype: torch.dtype, simulated_steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [w.to(dtype) for w in random_tensors((37, 11), (1,), (1025,), (5, 3, 2, 2))]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)  # 64-bit offsets
    indices = [some_indices(w.numel()) for w in weights]
    runs = [tune(weights, indices) for _ in range(2)]
    for tuned, backend in zip(runs, ("cuda", "cpu"), strict=True):
        monkeypatch.setattr(_backend, "choose", lambda *_, backend=backend: backend)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1)
        for values in tuned.parameters():
            values.grad = torch.arange(1.0, len(values) + 1)
        optimizer.step()
    assert simulated_steps.launches == 1
    for ours, theirs in zip(*(tuned.model.state_dict().values() for tuned in runs), strict=True):
        assert same_bits(ours, theirs)
