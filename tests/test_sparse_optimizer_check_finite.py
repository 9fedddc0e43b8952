"""check_finite=True: a step with NaN or infinity in a gradient is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copying import pickled
from sparse_optimizer_makers import BACKENDS, MAKERS, Make, half_mask, small_net
from stepping import assert_state, same_bits, state_of
from torch import nn

import fishfast as ff


def after_a_backward(
    make: Make, **options: Any
) -> tuple[ff.SparseTuning, torch.optim.Optimizer, list[torch.Tensor]]:
    """Return a run after one step and another backward, and its compact gradients."""
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    optimizer = make(tuned.parameters(), **options)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        if step == 0:
            optimizer.step()
    return tuned, optimizer, [parameter.grad for parameter in tuned.parameters()]


def assert_refused(tuned: ff.SparseTuning, optimizer: Any, message: str) -> None:
    weights, state = state_of(tuned.model), copy.deepcopy(optimizer.state_dict()["state"])
    masters = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_state(tuned.model, weights)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))
    for index, entry in optimizer.state_dict()["state"].items():
        assert entry.keys() == state[index].keys()
        assert all(same_bits(entry[name], value) for name, value in state[index].items())


@MAKERS
@BACKENDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_names_the_weight_and_changes_nothing(make: Make, backend: str, bad: float) -> None:
    tuned, optimizer, gradients = after_a_backward(make, check_finite=True, backend=backend)
    gradients[2][1] = bad
    assert_refused(tuned, optimizer, r"gradients must be finite .* for '2\.weight'; nothing was")
    gradients[2][1] = 1.0
    before = state_of(tuned.model)
    optimizer.step()
    assert not same_bits(tuned.model.state_dict()["2.weight"], before["2.weight"])


@MAKERS
def test_names_all_of_them(make: Make) -> None:
    tuned, optimizer, gradients = after_a_backward(make, check_finite=True)
    for gradient in gradients[1:3]:
        gradient[0] = torch.nan
    assert_refused(tuned, optimizer, r"infinity for '0\.bias', '2\.weight'; nothing was changed")


def test_names_plain_parameters_as_well_as_it_can() -> None:
    head = nn.Linear(2, 2)
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer = ff.SGD([{"params": [head.weight]}, {"params": [head.bias]}], check_finite=True)
    with pytest.raises(RuntimeError, match="number 0 of its param group, number 0 of its"):
        optimizer.step()
    named = ff.SGD(head.named_parameters(), check_finite=True)
    with pytest.raises(RuntimeError, match="for 'weight', 'bias'; nothing was changed"):
        named.step()


@MAKERS
def test_is_off_by_default(make: Make) -> None:
    tuned, optimizer, gradients = after_a_backward(make)
    gradients[2][1] = torch.nan
    optimizer.step()
    assert tuned.model.state_dict()["2.weight"].isnan().sum() == 1


@MAKERS
def test_overflow_under_a_grad_scaler_is_skipped_not_refused(make: Make) -> None:
    tuned, optimizer, gradients = after_a_backward(make, check_finite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    gradients[0][0] = torch.inf
    before = state_of(tuned.model)
    scaler.step(optimizer)
    scaler.update()
    assert_state(tuned.model, before)
    assert scaler.get_scale() == 2.0


@MAKERS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_goes_with_copies_of_the_optimizer(make: Make, copied: Callable[[Any], Any]) -> None:
    tuned, optimizer = copied(after_a_backward(make, check_finite=True)[:2])
    for parameter in tuned.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert_refused(tuned, optimizer, "gradients must be finite with check_finite=True")


@MAKERS
def test_is_refused_with_capturable(make: Make) -> None:
    tuned, *_ = after_a_backward(make)
    with pytest.raises(ValueError, match="check_finite must be False with capturable=True; got"):
        make(tuned.parameters(), check_finite=True, capturable=True)
