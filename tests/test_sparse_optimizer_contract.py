"""The torch.optim contract that ff.AdamW and ff.SGD share, around the compact parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copying import pickled, saved_by_torch
from sparse_optimizer_makers import BACKENDS, MAKERS, Make, half_mask, small_net
from stepping import (
    assert_state,
    gradients_over_time,
    mask_of,
    random_tensors,
    same_bits,
    set_gradients,
    some_indices,
    state_of,
    steps_of_ours,
    tune,
)
from torch import Tensor, nn

import fishfast as ff


@MAKERS
def test_closure_runs_with_gradients_and_returns_the_loss(make: Make) -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    optimizer = make(tuned.parameters())
    data = torch.randn(4, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(data).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


@MAKERS
def test_step_hooks_run(make: Make) -> None:
    weights = random_tensors(5)
    tuned = tune(weights, [torch.arange(5)])
    optimizer = make(tuned.parameters())
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", tuned.model.w0[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", tuned.model.w0[0].item())))
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    assert [name for name, _ in seen] == ["pre", "post"]
    assert seen[0][1] == weights[0][0].item() != seen[1][1]


@MAKERS
@BACKENDS
def test_add_param_group_with_a_plain_parameter(make: Make, backend: str) -> None:
    weights = random_tensors((4, 4))
    tuned = tune(weights, [some_indices(16)])
    plain, expected = (nn.Parameter(torch.ones(7)) for _ in range(2))
    optimizer = make(tuned.parameters(), backend=backend)
    optimizer.add_param_group({"params": [plain], "lr": 0.5})
    dense = tune([torch.ones(7)], [torch.arange(7)])
    reference = make(dense.parameters(), lr=0.5, backend=backend)
    for seed in range(3):
        plain.grad = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        steps_of_ours(dense, reference, [[plain.grad]])
        set_gradients(tuned, [torch.ones(4, 4)])
        optimizer.step()
    assert same_bits(plain, dense.model.w0)
    assert not torch.equal(plain, expected)


@MAKERS
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make: Make, set_to_none: bool) -> None:
    weights = random_tensors(5)
    tuned = tune(weights, [torch.arange(5)])
    optimizer = make(tuned.parameters())
    set_gradients(tuned, [torch.ones(5)])
    optimizer.zero_grad(set_to_none=set_to_none)
    (values,) = tuned.parameters()
    if set_to_none:
        assert values.grad is None
    else:
        assert torch.equal(values.grad, torch.zeros(5))
    optimizer.step()
    assert ("momentum_buffer" in optimizer.state[values] or "step" in optimizer.state[values]) is (
        not set_to_none
    )
    assert same_bits(tuned.model.w0, weights[0])


@MAKERS
def test_tensor_lr_is_read_in_each_step(make: Make) -> None:
    # Schedulers write into the tensor.
    weights = random_tensors((9, 5))
    found = some_indices(45)
    series = gradients_over_time(weights, steps=3)
    held, by_hand = tune(weights, [found]), tune(weights, [found])
    rate = torch.tensor([0.1])
    optimizer, other = make(held.parameters(), lr=rate), make(by_hand.parameters(), lr=0.1)
    for gradients, lr in zip(series, (0.5, 0.25, 0.0), strict=True):
        rate.fill_(lr)
        other.param_groups[0]["lr"] = torch.tensor(lr)
        steps_of_ours(held, optimizer, [gradients])
        steps_of_ours(by_hand, other, [gradients])
    assert_state(held.model, state_of(by_hand.model))
    assert not same_bits(held.model.w0, weights[0])


@MAKERS
@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_how_torch_runs_a_step_does_not_matter(make: Make, option: str) -> None:
    weights = random_tensors(5)
    plain, chosen = (tune(weights, [torch.arange(5)]) for _ in range(2))
    steps_of_ours(plain, make(plain.parameters()), [[torch.ones(5)]])
    for value in (None, False, True):
        optimizer = make(chosen.parameters(), **{option: value})
        assert optimizer.defaults[option] is value
    steps_of_ours(chosen, optimizer, [[torch.ones(5)]])
    assert_state(chosen.model, state_of(plain.model))


@MAKERS
def test_load_hook_may_convert_the_state(make: Make) -> None:
    # Saved flat and padded, as some shard it; the hook cuts it to size.
    weights = random_tensors((9, 5))
    series = gradients_over_time(weights, steps=3)
    first, second = (tune(weights, [torch.arange(45)]) for _ in range(2))
    optimizer, other = make(first.parameters()), make(second.parameters())
    steps_of_ours(first, optimizer, series[:1])
    steps_of_ours(second, make(second.parameters()), series[:1])
    padded = copy.deepcopy(optimizer.state_dict())
    for name, value in padded["state"][0].items():
        if value.dim():
            padded["state"][0][name] = torch.cat([value, torch.ones(3)])

    def cut(_: Any, state: dict[str, Any]) -> None:
        state["state"] = {
            index: {name: value[:45] if value.dim() else value for name, value in entry.items()}
            for index, entry in state["state"].items()
        }

    with pytest.raises(ValueError, match="state_dict must fit the parameters"):
        other.load_state_dict(padded)
    other.register_load_state_dict_pre_hook(cut)
    other.load_state_dict(padded)
    steps_of_ours(first, optimizer, series[1:])
    steps_of_ours(second, other, series[1:])
    assert_state(second.model, state_of(first.model))


@MAKERS
def test_loaded_state_is_a_copy(make: Make) -> None:
    weights = random_tensors((9, 5))
    series = gradients_over_time(weights, steps=3)
    first, second = (tune(weights, [torch.arange(45)]) for _ in range(2))
    optimizer, other = make(first.parameters()), make(second.parameters())
    steps_of_ours(first, optimizer, series[:1])
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    steps_of_ours(second, other, series[1:])
    after = optimizer.state_dict()["state"]
    assert all(same_bits(after[0][name], value) for name, value in before[0].items())


@MAKERS
def test_state_of_an_older_version(make: Make) -> None:
    # Without the options that came later, and with the step as a number.
    weights = random_tensors((9, 5))
    series = gradients_over_time(weights, steps=3)
    straight, resumed = (tune(weights, [torch.arange(45)]) for _ in range(2))
    options = {"amsgrad": False} if "amsgrad" in make(straight.parameters()).defaults else {}
    optimizer, other = (make(t.parameters(), **options) for t in (straight, resumed))
    steps_of_ours(straight, optimizer, series[:1])
    steps_of_ours(resumed, other, series[:1])
    state = copy.deepcopy(optimizer.state_dict())
    kept = {"params", "lr", "betas", "eps", "weight_decay", "momentum", "dampening"}
    state["param_groups"] = [
        {k: v for k, v in g.items() if k in kept} for g in state["param_groups"]
    ]
    for entry in state["state"].values():
        if "step" in entry:
            entry["step"] = float(entry["step"])
    other.load_state_dict(state)
    steps_of_ours(straight, optimizer, series[1:])
    steps_of_ours(resumed, other, series[1:])
    assert_state(resumed.model, state_of(straight.model))


@MAKERS
def test_empty_and_frozen_plain_parameters(make: Make) -> None:
    empty, frozen = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(3).bfloat16(), False)
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make([empty, frozen, *tuned.parameters()])
    empty.grad = torch.empty(0, 4)
    set_gradients(tuned, [torch.ones(5)])
    before = tuned.model.w0.detach().clone()
    optimizer.step()
    assert not torch.equal(tuned.model.w0, before)


@MAKERS
def test_gradient_that_is_not_contiguous(make: Make) -> None:
    strided, plain = (tune(random_tensors(12), [torch.arange(6)]) for _ in range(2))
    grad = torch.randn(12)
    next(strided.parameters()).grad = grad[::2]
    next(plain.parameters()).grad = grad[::2].clone()
    make(strided.parameters()).step()
    make(plain.parameters()).step()
    assert_state(strided.model, state_of(plain.model))


@MAKERS
def test_loaded_state_that_is_strided(make: Make) -> None:
    # torch gives state the strides of its parameter, here those of a channels_last convolution.
    straight, resumed = (nn.Parameter(torch.zeros(4, 3, 2, 2)) for _ in range(2))
    grad = torch.randn(4, 3, 2, 2)
    optimizer = make([straight])
    straight.grad = grad
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for name, value in state["state"][0].items():
        if value.dim():
            state["state"][0][name] = value.to(memory_format=torch.channels_last)
    with torch.no_grad():
        resumed.copy_(straight)
    other = make([resumed])
    other.load_state_dict(state)
    for parameter, stepper in ((straight, optimizer), (resumed, other)):
        parameter.grad = grad
        stepper.step()
    assert same_bits(straight, resumed)


@MAKERS
@BACKENDS
def test_autograd_notices_a_stale_weight(make: Make, backend: str) -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    optimizer = make(tuned.parameters(), backend=backend)
    loss = model(torch.randn(4, 6)).square().sum()
    loss.backward(retain_graph=True)
    weight = model[2]._parameters["weight"]
    before = weight._version, next(tuned.parameters())._version
    optimizer.step()
    assert weight._version > before[0]
    assert next(tuned.parameters())._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_masks_of_two_models_in_one_optimizer() -> None:
    first, second = (tune(random_tensors(5), [torch.arange(5)]) for _ in range(2))
    optimizer = ff.SGD([*first.parameters(), *second.parameters()], lr=1.0)
    set_gradients(first, [torch.ones(5)])
    set_gradients(second, [2 * torch.ones(5)])
    optimizer.step()
    assert mask_of(first.model, {}).num_selected == 0
    assert not torch.equal(first.model.w0, second.model.w0)


# --- copies of the optimizer ---


@MAKERS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
def test_copy_of_tuning_and_optimizer_trains_on_alone(
    make: Make, copied: Callable[[Any], Any]
) -> None:
    weights = random_tensors((9, 5), (7,))
    indices = [some_indices(45), torch.arange(7)]
    series = gradients_over_time(weights, steps=5)
    straight, original = tune(weights, indices), tune(weights, indices)
    steps_of_ours(straight, make(straight.parameters(), backend="torch"), series)
    optimizer = make(original.parameters(), backend="torch")
    steps_of_ours(original, optimizer, series[:2])
    before = state_of(original.model)
    other, its_optimizer = copied((original, optimizer))
    steps_of_ours(other, its_optimizer, series[2:])
    assert_state(other.model, state_of(straight.model))
    assert_state(original.model, before)


@MAKERS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
def test_copy_of_the_optimizer_alone_steps(make: Make, copied: Callable[[Any], Any]) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make(tuned.parameters())
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    before = state_of(tuned.model)
    other = copied(optimizer)
    (values,) = other.param_groups[0]["params"]
    values.grad = torch.ones(5)
    other.step()
    # By itself its parameter is a plain one, as a copy of torch's own optimizer has it.
    assert type(values) is nn.Parameter
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    assert same_bits(values, next(tuned.parameters()))
    assert not same_bits(tuned.model.w0, before["w0"])
