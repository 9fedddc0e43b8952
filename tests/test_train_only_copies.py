"""Copies of a masked model, of a part of it or of a compact parameter stand alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copying import pickled, pickled_with_protocol_0, saved_by_torch
from stepping import assert_state, same_bits, state_of
from torch import nn
from train_only_modules import built, mask_over_all, numbers, square_loss
from train_only_net import assert_masters_match, compact, train, tuned_net

import fishfast as ff

COPIES = [copy.deepcopy, pickled, pickled_with_protocol_0, saved_by_torch]


@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
def test_copy_of_the_model_trains_alone(copied: Callable[[Any], Any]) -> None:
    straight, original = tuned_net(), tuned_net()
    train(straight.model, ff.AdamW(straight.parameters(), lr=0.1))
    before = state_of(original.model)
    other = copied(original.model)
    assert type(other.conv).__name__ == "Conv2d"
    assert isinstance(other.conv, nn.Conv2d)
    assert other.again.weight_values is other.first.weight_values
    assert other.again._parameters["weight"] is other.first._parameters["weight"]
    train(other, ff.AdamW(compact(other), lr=0.1))
    assert_state(other, state_of(straight.model))
    assert_state(original.model, before)
    assert all(p.grad is None for p in original.parameters())


def test_copy_of_a_trained_lstm_trains_alone() -> None:
    # nn.LSTM keeps references to its weights in a list.
    model, data = built("lstm")
    tuned = ff.train_only(model, mask_over_all(model))
    other = copy.deepcopy(model)
    before = state_of(model)
    square_loss(data)(other).backward()
    ff.SGD(compact(other), lr=0.1).step()
    assert_state(model, before)
    with torch.no_grad():
        assert not torch.equal(other(data), model(data))
    assert all(p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize("copied", [*COPIES, copy.copy], ids=lambda f: f.__name__)
def test_copy_of_one_compact_parameter_is_a_plain_one(copied: Callable[[Any], Any]) -> None:
    parameter = next(tuned_net().parameters())
    other = copied(parameter)
    assert type(other) is nn.Parameter
    assert other.requires_grad
    assert same_bits(other, parameter)
    # copy.copy of torch's own parameters shares their memory, too.
    assert (other.data_ptr() == parameter.data_ptr()) is (copied is copy.copy)


@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", [0, 1], ids=["model first", "optimizer first"])
def test_copy_of_model_and_optimizer_together(copied: Callable[[Any], Any], order: int) -> None:
    tuned = tuned_net()
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    train(tuned.model, optimizer)
    pair = [tuned.model, optimizer]
    found = copied(pair[::-1] if order else pair)
    model, other = found[::-1] if order else found
    assert [id(p) for p in other.param_groups[0]["params"]] == [id(p) for p in compact(model)]
    for net, stepper in ((tuned.model, optimizer), (model, other)):
        train(net, stepper)
    assert_state(model, state_of(tuned.model))
    assert_masters_match(model)


def test_copy_of_a_submodule() -> None:
    tuned = tuned_net()
    before = state_of(tuned.model)
    other = copy.deepcopy(tuned.model.conv)
    other(numbers(2, 3, 6, 6)).square().sum().backward()
    ff.SGD(compact(other), lr=0.1).step()
    assert not torch.equal(other.weight, tuned.model.conv.weight)
    assert_state(tuned.model, before)


def test_write_to_a_copied_weight_is_followed() -> None:
    """A copied tensor counts its versions from 0, so one write could look like none."""
    model = nn.Linear(4, 3)
    copied, tuned = copy.deepcopy((model, ff.train_only(model, mask_over_all(model))))
    with torch.no_grad():
        nn.init.zeros_(tuned.model.weight)
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not tuned.model.state_dict()["weight"].any()
    assert copied is not model
