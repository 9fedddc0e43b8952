"""Both optimizers through a real model: clipping, accumulation, schedulers, GradScaler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_optimizer_makers import BACKENDS, MAKERS, Make, half_mask, small_net
from stepping import (
    assert_state,
    gradients_over_time,
    random_tensors,
    same_bits,
    set_gradients,
    some_indices,
    state_of,
    steps_of_ours,
    tune,
)
from torch import nn

import fishfast as ff


@MAKERS
@BACKENDS
def test_training_a_model_equals_dense_training_with_masked_gradients(
    make: Make, backend: str
) -> None:
    dense, model = small_net(), small_net()
    # In every row and column, where the masked gradient has the dense one's bits.
    mask = ff.random_mask(model, density=0.8, seed=0)
    tuned = ff.train_only(model, mask)
    optimizer = make(tuned.parameters(), backend=backend)
    # The same step by hand over the whole model: ours, on a full mask of plain parameters.
    reference = make(dense.parameters(), backend=backend)
    for seed in range(5):
        batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        for net, stepper in ((dense, reference), (model, optimizer)):
            stepper.zero_grad()
            net(batch).square().mean().backward()
        for name, parameter in dense.named_parameters():
            keep = torch.zeros(parameter.numel()).index_fill(0, mask[name].long(), 1.0)
            parameter.grad *= keep.view(parameter.shape)
        reference.step()
        optimizer.step()
        assert_state(model, state_of(dense))


@MAKERS
def test_clip_grad_norm(make: Make) -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    model(torch.randn(5, 6)).square().sum().backward()
    gradients = [p.grad.clone() for p in tuned.parameters()]
    total = torch.cat(gradients).norm()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm, total)
    clipped = torch.cat([p.grad for p in tuned.parameters()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.1))
    by_hand = small_net()
    expected = ff.train_only(by_hand, half_mask(by_hand))
    for parameter, values in zip(expected.parameters(), tuned.parameters(), strict=True):
        parameter.grad = values.grad.clone()
    make(tuned.parameters()).step()
    make(expected.parameters()).step()
    assert_state(model, state_of(by_hand))


def test_clip_grad_value() -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    model(torch.randn(5, 6)).square().sum().backward()
    expected = [p.grad.clamp(-0.2, 0.2) for p in tuned.parameters()]
    assert any((p.grad.abs() > 0.2).any() for p in tuned.parameters())
    nn.utils.clip_grad_value_(model.parameters(), 0.2)
    for parameter, clamped in zip(tuned.parameters(), expected, strict=True):
        assert same_bits(parameter.grad, clamped)


@MAKERS
def test_gradient_accumulation_equals_one_batch(make: Make) -> None:
    # Small integers: sums are exact, so that the order of the additions does not show.
    def integer_model() -> nn.Module:
        model = nn.Linear(6, 4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((torch.arange(parameter.numel()) % 5 - 2).view_as(parameter))
        return model

    data = torch.randint(-3, 4, (12, 6)).float()
    whole, parts = integer_model(), integer_model()
    results = []
    for model, chunks in ((whole, [data]), (parts, data.split([5, 4, 3]))):
        tuned = ff.train_only(model, half_mask(model))
        for part in chunks:
            model(part).square().sum().backward()
        make(tuned.parameters()).step()
        results.append([p.grad for p in tuned.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert_state(whole, state_of(parts))


@MAKERS
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    ],
    ids=["StepLR", "CosineAnnealingLR", "OneCycleLR"],
)
def test_lr_schedulers(make: Make, schedule: Callable[[Any], Any]) -> None:
    weights = random_tensors((9, 5))
    found = some_indices(45)
    series = gradients_over_time(weights, steps=5)
    scheduled, by_hand = tune(weights, [found]), tune(weights, [found])
    optimizer, other = make(scheduled.parameters()), make(by_hand.parameters())
    scheduler = schedule(optimizer)
    rates = []
    for gradients in series:
        rates.append(optimizer.param_groups[0]["lr"])
        for key in ("lr", "betas", "momentum"):
            if key in other.param_groups[0]:
                other.param_groups[0][key] = optimizer.param_groups[0][key]
        steps_of_ours(scheduled, optimizer, [gradients])
        steps_of_ours(by_hand, other, [gradients])
        scheduler.step()
    assert len(set(rates)) > 1
    assert_state(scheduled.model, state_of(by_hand.model))


# --- GradScaler ---


@MAKERS
@BACKENDS
@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
def test_grad_scaler_skips_the_whole_step_on_overflow(
    make: Make, backend: str, overflow: float
) -> None:
    weights = random_tensors((9, 5), (7,))
    tuned = tune(weights, [some_indices(45), torch.arange(7)])
    optimizer = make(tuned.parameters(), weight_decay=0.1, backend=backend)
    steps_of_ours(tuned, optimizer, gradients_over_time(weights, steps=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes the scale, as scaling a loss does
    before = state_of(tuned.model)
    masters = [p.detach().clone() for p in tuned.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    bad = torch.zeros(45)
    bad[tuned.mask["w0"][0]] = overflow
    set_gradients(tuned, [bad.view(9, 5), torch.ones(7)])  # w1 has good ones: it waits too
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_state(tuned.model, before)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))
    after = optimizer.state_dict()["state"]
    for index, entry in state.items():
        assert entry.keys() == after[index].keys()
        assert all(same_bits(after[index][key], value) for key, value in entry.items())


@MAKERS
@BACKENDS
def test_grad_scaler_steps_equal_unscaled_ones(make: Make, backend: str) -> None:
    weights = random_tensors((9, 5), (7,))
    indices = [some_indices(45), torch.arange(7)]
    scaled, plain = tune(weights, indices), tune(weights, indices)
    optimizer = make(scaled.parameters(), backend=backend)
    reference = make(plain.parameters(), backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for gradients in gradients_over_time(weights, steps=6):
        scale = float(scaler.scale(torch.ones(())))
        set_gradients(scaled, [g * scale for g in gradients])
        scaler.step(optimizer)
        scaler.update()
        steps_of_ours(plain, reference, [gradients])
        assert_state(scaled.model, state_of(plain.model))
    assert scaler.get_scale() > 1024.0


@MAKERS
def test_grad_scaler_unscale_then_clip(make: Make) -> None:
    weights = random_tensors((9, 5))
    indices = [some_indices(45)]
    scaled, plain = tune(weights, indices), tune(weights, indices)
    (gradients,) = gradients_over_time(weights, steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = make(scaled.parameters())
    set_gradients(scaled, [g * float(scaler.scale(torch.ones(()))) for g in gradients])
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
    scaler.step(optimizer)
    set_gradients(plain, gradients)
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    make(plain.parameters()).step()
    assert_state(scaled.model, state_of(plain.model))


def test_overflow_of_an_unmasked_weight_is_no_overflow() -> None:
    tuned = tune(random_tensors(6), [torch.tensor([1, 4])])
    optimizer = ff.SGD(tuned.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    set_gradients(tuned, [torch.tensor([torch.inf, 2.0, torch.nan, torch.inf, 4.0, torch.inf])])
    before = tuned.model.w0.detach().clone()
    scaler.step(optimizer)
    assert same_bits(tuned.model.w0.detach()[[1, 4]], before[[1, 4]] - torch.tensor([1.0, 2.0]))
