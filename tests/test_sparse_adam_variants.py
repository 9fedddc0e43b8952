"""ff.Adam, and amsgrad in ff.Adam and ff.AdamW, against torch's on gradients times the mask."""

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
    TORCH_ADAM,
    TORCH_ADAMW,
    TORCH_HAS_FMA,
    CorrectSqrt,
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

OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Adam": (ff.Adam, TORCH_ADAM),
    "AdamW": (ff.AdamW, TORCH_ADAMW),
}
# Gradients grow smaller in time or vanish, so that the largest second moment is not the last one.
FADING = [1.0, 2.0**-3, 0.0, 2.0**-6, 2.0, 2.0**-9]


def fading_gradients(weights: list[Tensor], steps: int = 6) -> list[list[Tensor]]:
    series = gradients_over_time(weights, steps)
    return [[g * FADING[i % 6] for g in step] for i, step in enumerate(series)]


def compare(
    name: str,
    weights: list[Tensor],
    indices: list[Tensor],
    series: list[list[Tensor]],
    backend: str,
    **options: Any,
) -> list[dict[str, Tensor]]:
    ours_of, torch_of = OPTIMIZERS[name]
    options = {"lr": 0.05, "weight_decay": 0.0, **options}
    tuned = tune(weights, indices)
    with CorrectSqrt():
        ours = steps_of_ours(tuned, ours_of(tuned.parameters(), backend=backend, **options), series)
    theirs = steps_of_torch(weights, indices, series, functools.partial(torch_of, **options))
    suffixes = ("", ".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq")
    exact = None
    if not TORCH_HAS_FMA:
        exact = oracle_history(
            oracle.adamw_trajectory, suffixes[: 3 + options.get("amsgrad", False)],
            weights, indices, series, decoupled_weight_decay=name == "AdamW", **options,
        )  # fmt: skip
    assert_same_history(ours, theirs, exact)
    return ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "betas": (0.9, 0.5)},
        {"amsgrad": True, "betas": (0.3, 0.5), "maximize": True, "lr": torch.tensor(0.02)},
    ],
    ids=["plain", "amsgrad", "amsgrad, maximize, tensor lr"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_torch_bit_for_bit(name: str, options: dict[str, Any], backend: str) -> None:
    weights = random_tensors((37, 11), (5, 3, 2, 2), (53,))
    indices = [some_indices(w.numel(), seed=i) for i, w in enumerate(weights)]
    compare(name, weights, indices, fading_gradients(weights), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["lr number", "lr tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_full_mask_equals_torch_with_weight_decay(
    name: str, lr: float | Tensor, amsgrad: bool, backend: str
) -> None:
    weights = random_tensors((31, 7), (64,))
    indices = [torch.arange(w.numel()) for w in weights]
    series = fading_gradients(weights)
    options = {"lr": lr, "weight_decay": 0.3, "betas": (0.8, 0.6), "amsgrad": amsgrad}
    compare(name, weights, indices, series, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [1, 31, 33, CPU_CHUNK, CPU_CHUNK + 1])
def test_sizes(numel: int, backend: str) -> None:
    weights = random_tensors(numel)
    options = {"amsgrad": True, "weight_decay": 0.1, "betas": (0.9, 0.5)}
    compare(
        "Adam", weights, [torch.arange(numel)], fading_gradients(weights, 3), backend, **options
    )


def test_the_largest_second_moment_is_what_divides() -> None:
    """The gradients above tell amsgrad from Adam."""
    weights = random_tensors(64)
    series, found = fading_gradients(weights), [torch.arange(64)]
    plain, amsgrad = (
        compare("Adam", weights, found, series, "cpu", betas=(0.9, 0.5), amsgrad=amsgrad)
        for amsgrad in (False, True)
    )
    assert not same_bits(plain[-1]["w0"], amsgrad[-1]["w0"])
    assert (amsgrad[-1]["w0.max_exp_avg_sq"] > amsgrad[-1]["w0.exp_avg_sq"]).any()


def test_penalty_touches_masked_weights_only() -> None:
    (weight,) = random_tensors(100)
    found = some_indices(100).long()
    tuned = tune([weight], [found])
    optimizer = ff.Adam(tuned.parameters(), weight_decay=0.5)
    steps_of_ours(tuned, optimizer, [[torch.zeros(100)]])
    changed = (tuned.model.w0.detach() != weight).nonzero().flatten()
    assert torch.equal(changed, found)  # although no gradient moved them


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_the_largest_second_moment(backend: str) -> None:
    tuned = tune(random_tensors(3), [torch.arange(3)])
    optimizer = ff.AdamW(tuned.parameters(), amsgrad=True, backend=backend)
    nan = torch.tensor([torch.nan, 1.0, 1.0])
    *_, last = steps_of_ours(tuned, optimizer, [[nan], [torch.ones(3)]])
    assert last["w0.max_exp_avg_sq"].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_one_optimizer(backend: str) -> None:
    weights = random_tensors((9, 5), (17,), (4, 4))
    options: list[dict[str, Any]] = [{"amsgrad": True}, {"weight_decay": 0.3}, {"maximize": True}]
    series = fading_gradients(weights, 4)

    def groups(parameters: Any) -> list[dict[str, Any]]:
        return [{"params": [p], **o} for p, o in zip(parameters, options, strict=True)]

    tuned = tune(weights, [torch.arange(w.numel()) for w in weights])
    optimizer = ff.Adam(groups(tuned.parameters()), lr=0.1, backend=backend)
    together = steps_of_ours(tuned, optimizer, series)[-1]
    for position, weight in enumerate(weights):
        alone = tune([weight], [torch.arange(weight.numel())])
        stepper = ff.Adam(alone.parameters(), lr=0.1, backend=backend, **options[position])
        history = steps_of_ours(alone, stepper, [[step[position]] for step in series])
        for key, value in history[-1].items():
            assert same_bits(together[key.replace("w0", f"w{position}")], value)


# --- states ---


def as_torch(name: str, tuned: ff.SparseTuning, **options: Any) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[name][1](tuned.parameters(), weight_decay=0.1, **options)
    tuned.attach(optimizer)
    return optimizer


def as_ours(name: str, tuned: ff.SparseTuning, **options: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name][0](tuned.parameters(), weight_decay=0.1, **options)


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [(as_ours, as_ours), (as_torch, as_ours), (as_ours, as_torch)],
    ids=["ours to ours", "torch to ours", "ours to torch"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_reloaded_mid_run(
    name: str, first: Callable[..., Any], second: Callable[..., Any], amsgrad: bool, tmp_path: Any
) -> None:
    weights = random_tensors((9, 5), (17,))
    indices = [some_indices(w.numel()) for w in weights]
    series = fading_gradients(weights)
    uninterrupted, before, after = (tune(weights, indices) for _ in range(3))
    options = {"lr": 0.05, "betas": (0.9, 0.6), "amsgrad": amsgrad}
    with CorrectSqrt():
        expected = steps_of_ours(uninterrupted, as_ours(name, uninterrupted, **options), series)
        optimizer = first(name, before, **options)
        steps_of_ours(before, optimizer, series[:3])
        state = through_a_file(before, optimizer, tmp_path / "checkpoint.pt")
        after.model.load_state_dict(state["model"])
        resumed = second(name, after)  # its options come with the state
        resumed.load_state_dict(state["optimizer"])
        ours = steps_of_ours(after, resumed, series[3:])
    assert_same_history(ours, expected[3:])


@pytest.mark.parametrize("option", ["capturable", "fused", "differentiable"])
def test_state_of_torch_that_ran_in_another_way(option: str) -> None:
    """The way does not come along: the state alone decides how it goes on."""
    weights = random_tensors((9, 5))
    series = fading_gradients(weights, 3)
    source, plain, loaded = (tune(weights, [torch.arange(45)]) for _ in range(3))
    steps_of_ours(source, optimizer := as_torch("AdamW", source), series[:1])
    results = []
    for tuned, value in ((plain, False), (loaded, True)):
        state = optimizer.state_dict()
        state["param_groups"][0] |= {option: value}
        resumed = as_ours("AdamW", tuned)
        resumed.load_state_dict(state)
        assert not resumed.param_groups[0]["capturable"]
        assert not resumed.param_groups[0]["differentiable"]
        results.append(steps_of_ours(tuned, resumed, series[1:])[-1])
    assert_same_history(results[:1], results[1:])


def test_decay_stays_what_it_is() -> None:
    """AdamW decouples its decay whatever is loaded; Adam takes what the state says, as in torch."""
    tuned = tune(random_tensors(5), [torch.arange(5)])
    adam, adamw = ff.Adam(tuned.parameters()), ff.AdamW(tuned.parameters())
    saved = adamw.state_dict()
    adamw.load_state_dict(adam.state_dict())
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True
    adam.load_state_dict(saved)
    assert adam.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("backend", BACKENDS)
def test_amsgrad_switched_on_and_off_mid_run(backend: str) -> None:
    weights = random_tensors((9, 5))
    series = fading_gradients(weights)
    tuned, plain = (tune(weights, [torch.arange(45)]) for _ in range(2))
    optimizer = ff.AdamW(tuned.parameters(), lr=0.0, backend=backend)
    steps_of_ours(tuned, optimizer, series[:1])
    optimizer.param_groups[0]["amsgrad"] = True
    *_, last = steps_of_ours(tuned, optimizer, series[1:4])
    assert (last["w0.max_exp_avg_sq"] > last["w0.exp_avg_sq"]).any()
    # Off again, the last second moment divides, as if amsgrad had never been on.
    optimizer.param_groups[0].update(amsgrad=False, lr=0.05)
    without = ff.AdamW(plain.parameters(), lr=0.0, backend=backend)
    steps_of_ours(plain, without, series[:4])
    without.param_groups[0]["lr"] = 0.05
    steps_of_ours(tuned, optimizer, series[4:])
    steps_of_ours(plain, without, series[4:])
    assert same_bits(tuned.model.w0, plain.model.w0)


# --- options ---


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ff.Adam, torch.optim.Adam), (ff.AdamW, torch.optim.AdamW)]
)
def test_arguments_come_in_the_order_of_torch(ours: Any, theirs: Any) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    arguments = (0.5, (0.1, 0.2), 0.25, 0.75, True)
    mine, other = (make(tuned.parameters(), *arguments).defaults for make in (ours, theirs))
    assert all(mine[name] == value for name, value in other.items())
