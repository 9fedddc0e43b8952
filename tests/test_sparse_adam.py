"""ff.AdamW against torch.optim.AdamW on dense gradients times the mask, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from stepping import (
    BACKENDS,
    CPU_CHUNK,
    TORCH_ADAMW,
    TORCH_HAS_FMA,
    CorrectSqrt,
    assert_same_history,
    gradients_over_time,
    mask_of,
    oracle_history,
    random_tensors,
    same_bits,
    some_indices,
    steps_of_ours,
    steps_of_torch,
    tune,
)
from torch import Tensor, nn

import fishfast as ff

float64_history = functools.partial(
    oracle_history, oracle.adamw_trajectory, ("", ".exp_avg", ".exp_avg_sq")
)


def compare(
    weights: list[Tensor],
    indices: list[Tensor],
    series: list[list[Tensor]],
    backend: str,
    **options: Any,
) -> None:
    tuned = tune(weights, indices)
    optimizer = ff.AdamW(tuned.parameters(), backend=backend, **options)
    with CorrectSqrt():
        ours = steps_of_ours(tuned, optimizer, series)
    options.setdefault("weight_decay", 0.0)
    theirs = steps_of_torch(
        weights, indices, series, lambda parameters: TORCH_ADAMW(parameters, **options)
    )
    options.setdefault("lr", 1e-3)
    exact = None if TORCH_HAS_FMA else float64_history(weights, indices, series, **options)
    assert_same_history(ours, theirs, exact)


# --- the oracle of DESIGN.md ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"betas": (0.3, 0.5), "eps": 1e-3},
        {"betas": (0.0, 0.0)},
        {"lr": torch.tensor(0.02), "betas": (0.8, 0.95)},
        {"maximize": True},
        {"lr": 0.0},
        {"eps": 0.0},
    ],
    ids=["defaults", "large lr", "far lerp", "no memory", "tensor lr", "maximize", "lr 0", "eps 0"],
)
def test_equals_torch_bit_for_bit(options: dict[str, Any], backend: str) -> None:
    weights = random_tensors((37, 11), (5, 3, 2, 2), (53,))
    indices = [some_indices(w.numel(), seed=i) for i, w in enumerate(weights)]
    series = gradients_over_time(weights, steps=6)
    if options.get("eps") == 0.0:  # torch makes 0 / 0 of a weight that never had a gradient
        series = [[torch.where(g == 0, 1.0, g) for g in step] for step in series]
        indices = [torch.arange(w.numel()) for w in weights]
    compare(weights, indices, series, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["lr number", "lr tensor"])
def test_full_mask_equals_torch_with_weight_decay(
    lr: float | Tensor, weight_decay: float, backend: str
) -> None:
    weights = random_tensors((31, 7), (64,))
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    compare(weights, indices, series, backend, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "numel", [1, 2, 31, 32, 33, 97, 1009, CPU_CHUNK, CPU_CHUNK + 1, 5 * CPU_CHUNK]
)
def test_sizes(numel: int, backend: str) -> None:
    weights = random_tensors(numel)
    series = gradients_over_time(weights, steps=2)
    compare(weights, [torch.arange(numel)], series, backend, lr=0.01)


def test_is_as_near_to_float64_as_torch() -> None:
    weights = random_tensors((40, 5))
    indices = [some_indices(200)]
    series = gradients_over_time(weights, steps=10)
    options = {"lr": 0.01, "betas": (0.8, 0.95)}
    tuned = tune(weights, indices)
    ours = steps_of_ours(tuned, ff.AdamW(tuned.parameters(), **options), series)[-1]
    make = functools.partial(TORCH_ADAMW, weight_decay=0.0, **options)
    theirs = steps_of_torch(weights, indices, series, make)[-1]
    exact = float64_history(weights, indices, series, **options)[-1]
    for key, truth in exact.items():
        error = (ours[key].double() - truth).abs().max()
        assert error <= 2 * (theirs[key].double() - truth).abs().max(), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_param_groups_have_their_own_options(backend: str) -> None:
    weights = random_tensors((9, 5), (17,), (4, 4))
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=4)
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.8, 0.9)},
        {"weight_decay": 0.3, "eps": 1e-4},
        {"maximize": True, "lr": torch.tensor(0.02)},
    ]

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [p], **o} for p, o in zip(parameters, options, strict=True)]

    tuned = tune(weights, indices)
    optimizer = ff.AdamW(groups(list(tuned.parameters())), backend=backend)
    with CorrectSqrt():
        ours = steps_of_ours(tuned, optimizer, series)
    theirs = steps_of_torch(
        weights, indices, series, lambda p: TORCH_ADAMW(groups(p), weight_decay=0.0)
    )
    if not TORCH_HAS_FMA:
        pytest.skip("torch has no fused multiply-add here; the same in float64 is tested above")
    assert_same_history(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_without_a_gradient_in_some_steps(backend: str) -> None:
    weights = random_tensors((9, 5), (17,))
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    series[0][1] = series[2][0] = series[3][1] = None  # type: ignore[call-overload]
    tuned = tune(weights, indices)
    with CorrectSqrt():
        optimizer = ff.AdamW(tuned.parameters(), lr=0.1, backend=backend)
        ours = steps_of_ours(tuned, optimizer, series)
    make = functools.partial(TORCH_ADAMW, lr=0.1, weight_decay=0.0)
    theirs = steps_of_torch(weights, indices, series, make)
    assert [s.get("w1.step") for s in ours] == [None, 1, 2, 2, 3]
    if TORCH_HAS_FMA:
        assert_same_history(ours, theirs)


# --- layouts ---

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "dims swapped": lambda w: w.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_of_the_weight(layout: str, backend: str) -> None:
    weights = [LAYOUTS[layout](w) for w in random_tensors((6, 5, 3, 4))]
    indices = [some_indices(360)]
    series = gradients_over_time(weights, steps=3)
    compare(weights, indices, series, backend, lr=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_that_is_a_window_of_a_larger_tensor(backend: str) -> None:
    # Rows of 5 in a storage with rows of 8, starting at element 3: what lies between stays.
    storage = torch.randn(7, 8)
    before = storage.clone()
    model = nn.Module()
    model.weight = nn.Parameter(storage[:, 3:])
    tuned = ff.train_only(model, mask_of(model, {"weight": some_indices(35, 0.5)}))
    plain = tune([before[:, 3:].contiguous()], [tuned.mask["weight"]])
    series = gradients_over_time([before[:, 3:]], steps=3)
    steps_of_ours(tuned, ff.AdamW(tuned.parameters(), backend=backend), series)
    expected = steps_of_ours(plain, ff.AdamW(plain.parameters(), backend=backend), series)
    assert same_bits(storage[:, 3:], expected[-1]["w0"])
    assert same_bits(storage[:, :3], before[:, :3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_changed_between_steps(backend: str) -> None:
    weights = random_tensors((6, 5, 3, 4))
    indices = [some_indices(360)]
    series = gradients_over_time(weights, steps=4)
    expected_tuning, tuned = tune(weights, indices), tune(weights, indices)
    expected = steps_of_ours(
        expected_tuning, ff.AdamW(expected_tuning.parameters(), backend=backend), series
    )
    optimizer = ff.AdamW(tuned.parameters(), backend=backend)
    weight = tuned.model._parameters["w0"]
    for position, layout in enumerate(
        ["channels_last", "transposed", "contiguous", "dims swapped"]
    ):
        weight.data = LAYOUTS[layout](weight.data.contiguous())
        ours = steps_of_ours(tuned, optimizer, series[position : position + 1])
        assert_same_history(ours, expected[position : position + 1])


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be at least 0; got -1\.0"),
        ({"lr": float("nan")}, "lr must be at least 0; got nan"),
        ({"lr": torch.tensor(-0.5)}, "lr must be at least 0; got"),
        ({"eps": -1e-8}, "eps must be at least 0; got -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay must be at least 0; got -0\.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\); got \(1\.0, 0\.9\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\); got"),
        ({"betas": (0.9, float("nan"))}, r"betas must be in \[0, 1\); got"),
        ({"backend": "fast"}, "backend must be 'auto' or one of .*; got 'fast'"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of .* on cpu; got 'cuda'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_option_is_refused(options: dict[str, Any], message: str) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    with pytest.raises(ValueError, match=message):
        ff.AdamW(tuned.parameters(), **options)


def test_weight_decay_defaults_to_zero() -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    assert ff.AdamW(tuned.parameters()).defaults["weight_decay"] == 0
