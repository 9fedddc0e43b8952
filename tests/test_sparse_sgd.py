"""ff.SGD against torch.optim.SGD on dense gradients times the mask, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from copying import through_a_file
from stepping import (
    BACKENDS,
    CPU_CHUNK,
    TORCH_HAS_FMA,
    TORCH_SGD,
    assert_same_history,
    gradients_over_time,
    oracle_history,
    random_tensors,
    same_bits,
    some_indices,
    steps_of_ours,
    steps_of_torch,
    tune,
)
from torch import Tensor

import fishfast as ff

# Without weight decay any mask will do: an entry without a gradient stays as it is.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "dampening, no momentum": {"dampening": 0.3},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "maximize": {"momentum": 0.9, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.03), "momentum": 0.9},
    "lr 0": {"lr": 0.0, "momentum": 0.9},
}
DECAYS: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay": 0.1},
    "decay, momentum": {"weight_decay": 0.1, "momentum": 0.9},
    "decay, nesterov, maximize": {
        "weight_decay": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "maximize": True,
    },
}


float64_history = functools.partial(oracle_history, oracle.sgd_trajectory, ("",))


def compare(
    weights: list[Tensor],
    indices: list[Tensor],
    series: list[list[Tensor]],
    backend: str,
    **options: Any,
) -> None:
    options.setdefault("lr", 0.1)
    tuned = tune(weights, indices)
    ours = steps_of_ours(tuned, ff.SGD(tuned.parameters(), backend=backend, **options), series)
    theirs = steps_of_torch(weights, indices, series, lambda p: TORCH_SGD(p, **options))
    exact = None if TORCH_HAS_FMA else float64_history(weights, indices, series, **options)
    assert_same_history(ours, theirs, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch_bit_for_bit(name: str, backend: str) -> None:
    weights = random_tensors((37, 11), (5, 3, 2, 2), (53,))
    indices = [some_indices(w.numel(), seed=i) for i, w in enumerate(weights)]
    compare(weights, indices, gradients_over_time(weights, steps=6), backend, **OPTIONS[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECAYS)
def test_full_mask_equals_torch_with_weight_decay(name: str, backend: str) -> None:
    weights = random_tensors((31, 7), (64,))
    indices = [torch.arange(w.numel()) for w in weights]
    compare(weights, indices, gradients_over_time(weights, steps=6), backend, **DECAYS[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [1, 2, 31, 32, 33, 97, 1009, CPU_CHUNK, CPU_CHUNK + 1])
def test_sizes(numel: int, backend: str) -> None:
    weights = random_tensors(numel)
    series = gradients_over_time(weights, steps=3)
    compare(weights, [torch.arange(numel)], series, backend, momentum=0.9, weight_decay=0.01)


def test_is_as_near_to_float64_as_torch() -> None:
    weights = random_tensors((40, 5))
    indices = [torch.arange(200)]
    series = gradients_over_time(weights, steps=10)
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    tuned = tune(weights, indices)
    ours = steps_of_ours(tuned, ff.SGD(tuned.parameters(), **options), series)[-1]
    theirs = steps_of_torch(weights, indices, series, lambda p: TORCH_SGD(p, **options))[-1]
    exact = float64_history(weights, indices, series, **options)[-1]
    error = (ours["w0"].double() - exact["w0"]).abs().max()
    assert error <= 2 * (theirs["w0"].double() - exact["w0"]).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_without_a_gradient_in_some_steps(backend: str) -> None:
    weights = random_tensors((9, 5), (17,))
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    series[0][1] = series[2][0] = series[3][1] = None  # type: ignore[call-overload]
    tuned = tune(weights, indices)
    options = {"lr": 0.1, "momentum": 0.9}
    ours = steps_of_ours(tuned, ff.SGD(tuned.parameters(), backend=backend, **options), series)
    theirs = steps_of_torch(weights, indices, series, lambda p: TORCH_SGD(p, **options))
    assert "w1.momentum_buffer" not in ours[0]
    if TORCH_HAS_FMA:
        assert_same_history(ours, theirs)
    else:
        assert ours[-1].keys() == theirs[-1].keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["channels_last", "transposed"])
def test_memory_layout_of_the_weight(memory: str, backend: str) -> None:
    (weight,) = random_tensors((6, 5, 3, 4))
    if memory == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    else:
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    series = gradients_over_time([weight], steps=3)
    compare([weight], [some_indices(360)], series, backend, momentum=0.9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_fp32_masters(dtype: torch.dtype, backend: str) -> None:
    weights = [w.to(dtype) for w in random_tensors((33, 7))]
    indices = [some_indices(231)]
    series = gradients_over_time(weights, steps=6)
    low, full = tune(weights, indices), tune([w.float() for w in weights], indices)
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "backend": backend}
    steps_of_ours(low, ff.SGD(low.parameters(), **options), series)
    steps_of_ours(full, ff.SGD(full.parameters(), **options), series)
    (masters,), (expected,) = low.parameters(), full.parameters()
    assert same_bits(masters, expected)
    found = low.mask["w0"].long()
    assert same_bits(low.model.w0.detach().flatten()[found], expected.detach().to(dtype))
    rest = torch.ones(231, dtype=torch.bool).index_fill(0, found, False)
    assert same_bits(low.model.w0.detach().flatten()[rest], weights[0].flatten()[rest])


def as_torch(tuned: ff.SparseTuning, momentum: float) -> torch.optim.Optimizer:
    optimizer = TORCH_SGD(tuned.parameters(), lr=0.1, momentum=momentum)
    tuned.attach(optimizer)
    return optimizer


def as_ours(tuned: ff.SparseTuning, momentum: float) -> torch.optim.Optimizer:
    return ff.SGD(tuned.parameters(), lr=0.1, momentum=momentum)


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("first", "second"),
    [(as_ours, as_ours), (as_torch, as_ours), (as_ours, as_torch)],
    ids=["ours to ours", "torch to ours", "ours to torch"],
)
def test_state_reloaded_mid_run(
    first: Callable[..., Any], second: Callable[..., Any], momentum: float, tmp_path: Any
) -> None:
    weights = random_tensors((9, 5), (17,))
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=7)
    uninterrupted, before, after = (tune(weights, indices) for _ in range(3))
    expected = steps_of_ours(uninterrupted, as_ours(uninterrupted, momentum), series)
    optimizer = first(before, momentum)
    steps_of_ours(before, optimizer, series[:3])
    state = through_a_file(before, optimizer, tmp_path / "checkpoint.pt")
    after.model.load_state_dict(state["model"])
    resumed = second(after, momentum)
    resumed.load_state_dict(state["optimizer"])
    assert_same_history(steps_of_ours(after, resumed, series[3:]), expected[3:])


def test_momentum_buffer_of_another_mask_is_refused() -> None:
    weights = random_tensors((9, 5))
    small, large = tune(weights, [torch.arange(3)]), tune(weights, [torch.arange(30)])
    optimizer = ff.SGD(small.parameters(), momentum=0.9)
    steps_of_ours(small, optimizer, gradients_over_time(weights, steps=1))
    with pytest.raises(ValueError, match="must be of the model's present mask; got"):
        ff.SGD(large.parameters(), momentum=0.9).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0; got -1\.0"),
        ({"lr": float("nan")}, "lr must be at least 0; got nan"),
        ({"momentum": -0.5}, r"momentum must be at least 0; got -0\.5"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0; got nan"),
        ({"nesterov": True}, "nesterov needs momentum above 0 and dampening 0; got momentum=0"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            r"nesterov needs momentum above 0 and dampening 0; got .*dampening=0\.1",
        ),
        ({"backend": "cuda"}, "backend must be 'auto' or one of .*; got 'cuda'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_option_is_refused(options: dict[str, Any], message: str) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    with pytest.raises(ValueError, match=message):
        ff.SGD(tuned.parameters(), **options)
