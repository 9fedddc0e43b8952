"""What the handle does: attach another optimizer, and give the plain module back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import assert_state, same_bits, state_of
from torch import nn
from train_only_modules import built, dense_gradients, mask_over_all, numbers, square_loss
from train_only_net import assert_masters_match, net, net_mask, train, tuned_net

import fishfast as ff


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_attach_writes_the_values_of_any_torch_optimizer(make: Any) -> None:
    tuned = tuned_net()
    base = state_of(tuned.model)
    optimizer = make(tuned.parameters(), lr=0.1)
    handle = tuned.attach(optimizer)
    train(tuned.model, optimizer)
    assert_masters_match(tuned.model)
    for name, found in tuned.mask.items():
        now, before = tuned.model.state_dict()[name].flatten(), base[name].flatten()
        outside = torch.ones(now.numel(), dtype=torch.bool).index_fill(0, found.long(), False)
        assert same_bits(now[outside], before[outside])
        if len(found):
            assert not torch.equal(now, before)
    assert "mask_fingerprints" in optimizer.state_dict()["param_groups"][0]
    handle.remove()
    assert "mask_fingerprints" not in optimizer.state_dict()["param_groups"][0]
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_masters_match(tuned.model)  # which needs no attachment


def test_attach_refuses_an_optimizer_of_something_else() -> None:
    tuned, other = tuned_net(), net()
    with pytest.raises(
        ValueError, match="optimizer must hold compact parameters of this model; got"
    ):
        tuned.attach(torch.optim.SGD(other.parameters(), lr=0.1))


def test_release_gives_the_plain_module_back() -> None:
    model = net()
    model.free.weight.requires_grad_(False)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    tensors = {name: id(p) for name, p in model.named_parameters()}
    tuned = ff.train_only(model, net_mask(model))
    train(model, ff.SGD(tuned.parameters(), lr=0.1))
    trained = state_of(model)
    assert tuned.release() is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert_state(model, trained)
    assert not list(tuned.parameters())
    again = ff.train_only(model, net_mask(model))  # and can be masked anew
    assert again.num_selected == tuned.mask.num_selected


def test_released_lstm_trains_densely() -> None:
    model, data = built("lstm")
    twin = copy.deepcopy(model)
    ff.train_only(model, mask_over_all(model)).release()
    expected = dense_gradients(twin, square_loss(data))
    found = dense_gradients(model, square_loss(data))
    assert expected.keys() == found.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_weights_that_were_frozen_before_can_be_masked() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    tuned = ff.train_only(model, mask_over_all(model))
    model(numbers(2, 4)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())
    tuned.release()
    assert not any(p.requires_grad for p in model.parameters())


def test_lstm_assigned_and_released_uses_the_loaded_weights() -> None:
    model, data = built("lstm")
    tuned = ff.train_only(model, mask_over_all(model))
    other, _ = built("lstm")
    state = {name: tensor + 0.1 for name, tensor in other.state_dict().items()}
    other.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    tuned.release()
    with torch.no_grad():
        assert same_bits(model(data), other(data))


def test_attached_optimizer_resumes_exactly_in_bf16() -> None:
    """Promise: resuming equals not having stopped. The masters travel in the optimizer's state."""

    def start() -> tuple[ff.SparseTuning, torch.optim.Optimizer]:
        model = net().to(torch.bfloat16)
        tuned = ff.train_only(model, net_mask(model))
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3, foreach=False)
        tuned.attach(optimizer)
        return tuned, optimizer

    tuned, optimizer = start()
    train(tuned.model, optimizer, steps=5)
    saved = copy.deepcopy((tuned.model.state_dict(), optimizer.state_dict()))
    train(tuned.model, optimizer, steps=5)

    resumed, again = start()
    resumed.model.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed.model, again, steps=5)
    assert_state(resumed.model, state_of(tuned.model))
    assert all(map(torch.equal, tuned.parameters(), resumed.parameters()))


def test_attach_takes_masters_of_a_state_loaded_before() -> None:
    model = nn.Linear(4, 3).to(torch.bfloat16)
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-4)
    tuned.attach(optimizer)
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    masters = [parameter.detach().clone() for parameter in tuned.parameters()]

    again = nn.Linear(4, 3).to(torch.bfloat16)
    resumed = ff.train_only(again, mask_over_all(again))
    again.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-4)
    other.load_state_dict(optimizer.state_dict())
    resumed.attach(other)
    assert all(map(torch.equal, masters, resumed.parameters()))
    for parameter in resumed.parameters():  # the live state has it as it is: its own memory
        assert other.state[parameter]["master"].data_ptr() == parameter.data_ptr()


def test_attach_covers_groups_that_are_added_later() -> None:
    tuned = tuned_net()
    first, *others = tuned.parameters()
    optimizer = torch.optim.SGD([first], lr=0.1)
    tuned.attach(optimizer)
    optimizer.add_param_group({"params": others})
    train(tuned.model, optimizer)
    assert_masters_match(tuned.model)


def test_attach_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer; got int"):
        tuned_net().attach(3)


def test_the_handle_is_no_list_of_parameters() -> None:
    with pytest.raises(TypeError, match=r"got a SparseTuning; pass its \.parameters\(\)"):
        ff.AdamW(tuned_net())


def test_report_names_every_trained_weight() -> None:
    tuned = tuned_net()
    lines = tuned.report().splitlines()
    trained = {name: len(found) for name, found in tuned.mask.items() if len(found)}
    dense = ["picked", "from", "the", "dense", "gradient"]  # so small that nothing else pays
    assert [line.split() for line in lines[2:]] == [
        [name, "torch.float32", f"{count:,}", *dense] for name, count in trained.items()
    ]
