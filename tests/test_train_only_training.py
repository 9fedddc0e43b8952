"""Training loops around the compact parameters: accumulation, mixed precision, freezing, modes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from copying import pickled
from sparse_optimizer_makers import MAKERS, Make, half_mask, small_net
from stepping import assert_state, mask_of, same_bits, state_of
from torch import nn
from train_only_modules import MODULES, built, mask_over_all, numbers, square_loss
from train_only_net import assert_masters_match, net, net_mask, train
from train_only_transformers import tiny_transformer

import fishfast as ff

# --- accumulation ---

ACCUMULATED = [
    "linear", "tied", "called twice", "embedding", "conv2d, groups", "lstm", "bare parameters",
    "weight_norm", "weight_norm by hooks", "orthogonal", "own parametrization", "checkpoint",
    "checkpoint, reentrant",
]  # fmt: skip


@pytest.mark.parametrize("name", ACCUMULATED)
def test_micro_batches_are_added_to_the_gradient_in_fp32(name: str) -> None:
    """The second backward adds to what the first left, in place, and assigns nothing."""
    assert name in MODULES
    model, data = built(name)
    other = data.flip(0) if data.dtype == torch.int64 else data.flip(0) * 0.5
    tuned = ff.train_only(model, mask_over_all(model))
    parts = []
    for batch in (data, other):
        model.zero_grad()
        square_loss(batch)(model).backward()
        parts.append([p.grad for p in tuned.parameters()])
    model.zero_grad()
    square_loss(data)(model).backward()
    held = [p.grad for p in tuned.parameters()]
    square_loss(other)(model).backward()
    for parameter, grad, first, second in zip(tuned.parameters(), held, *parts, strict=True):
        if grad is None:  # such as weights that the module computes from others
            continue
        assert parameter.grad is grad
        assert grad.dtype == torch.float32
        assert same_bits(grad, first + second)
    assert any(grad is not None and grad.any() for grad in held)


def test_bf16_model_accumulates_in_fp32() -> None:
    """In bf16 1 + 2**-9 would be 1."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    tuned = ff.train_only(model, ff.random_mask(model, k=2, seed=0))
    (values,) = tuned.parameters()
    for scale in (1.0, 2.0**-9):
        model(torch.full((1, 2), scale, dtype=torch.bfloat16)).sum().backward()
    assert values.grad.tolist() == [1 + 2.0**-9] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_transformer_with_activation_checkpoints_accumulates(use_reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, loss = tiny_transformer("gpt2")
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:  # a checkpoint of this form needs an input that has a gradient
                model.enable_input_require_grads()
        tuned = ff.train_only(model, mask_over_all(model))
        for _ in range(2):
            loss(model).backward()
        gradients.append([p.grad for p in tuned.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert same_bits(plain, checkpointed)
        assert plain.any()


# --- mixed precision ---


@MAKERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_and_grad_scaler_skip_a_bad_batch(make: Make, dtype: torch.dtype) -> None:
    """A run with an infinite batch equals one that never saw it, but for the loss scale."""
    results = []
    for bad_batch in (None, 2):
        model = small_net()
        tuned = ff.train_only(model, half_mask(model))
        optimizer = make(tuned.parameters(), weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        for position in range(5 + (bad_batch is not None)):
            seed = position - (bad_batch is not None and position > bad_batch)
            data = numbers(16, 6, seed=seed)
            if position == bad_batch:
                data[3, 1] = torch.inf
            before = state_of(model), copy.deepcopy(optimizer.state_dict()["state"])
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = model(data).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if position == bad_batch:
                assert_state(model, before[0])
                for index, entry in optimizer.state_dict()["state"].items():
                    for name, value in entry.items():
                        assert same_bits(value, before[1][index][name])
                # A scale of a power of two less: the same bits in the end.
                assert scaler.get_scale() == 2.0**7
        assert_masters_match(model)
        results.append(state_of(model))
    if dtype == torch.bfloat16:  # fp16's small gradients round otherwise at another scale
        assert all(same_bits(value, results[1][name]) for name, value in results[0].items())


# --- freezing, modes, memory ---


@MAKERS
def test_compact_parameters_can_be_frozen_and_thawed(make: Make) -> None:
    model = net()
    tuned = ff.train_only(model, net_mask(model))
    optimizer = make(tuned.parameters())
    train(model, optimizer)
    frozen = dict(tuned.named_parameters())["conv.weight_values"].requires_grad_(False)
    before = state_of(model)
    optimizer.zero_grad()
    train(model, optimizer)
    assert frozen.grad is None
    assert same_bits(model.state_dict()["conv.weight"], before["conv.weight"])
    assert not same_bits(model.state_dict()["first.weight"], before["first.weight"])
    frozen.requires_grad_(True)
    train(model, optimizer)
    assert not same_bits(model.state_dict()["conv.weight"], before["conv.weight"])
    assert_masters_match(model)


def test_layers_without_masked_weights_have_no_gradient_and_pass_it_on() -> None:
    model = small_net()
    tuned = ff.train_only(model, mask_of(model, {"0.weight": torch.arange(3)}))
    square_loss(numbers(4, 6))(model).backward()
    (values,) = tuned.parameters()
    assert values.grad.any()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("_values"))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_the_forward_makes_no_copy_of_a_weight(context: Any) -> None:
    model = net()
    ff.train_only(model, net_mask(model))
    with context():
        for module in (model.conv, model.first, model.norm):
            assert module.weight.data_ptr() == module._parameters["weight"].data_ptr()


def test_train_and_eval_mode_go_on_as_in_the_plain_model() -> None:
    """Dropout and the statistics of norms follow the mode; masks have no part in it."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    plain, model = make(), make()
    ff.train_only(model, mask_over_all(model))
    for training in (True, False, True):
        for net_ in (plain, model):
            net_.train(training)
            torch.manual_seed(2)
            net_.output = net_(numbers(5, 6))
        assert same_bits(plain.output, model.output)
        assert_state(model, state_of(plain))
        assert model.training is training


# --- weights outside the mask ---


@MAKERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_untouched_weights_after_everything(make: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    """One model through all that a user may do; what no mask selected keeps its bits."""
    model = net().to(dtype)
    base = state_of(model)
    tuned = ff.train_only(model, net_mask(model))
    masks = [tuned.mask]

    def assert_untouched(trained: nn.Module) -> None:
        for name in masks[0].shapes:
            outside = torch.ones(base[name].numel(), dtype=torch.bool)
            for mask in masks:
                outside[mask[name].long()] = False
            now, before = trained.state_dict()[name].flatten(), base[name].flatten()
            assert same_bits(now[outside], before[outside]), name

    optimizer = make(tuned.parameters(), weight_decay=0.2)
    train(model, optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    next(tuned.parameters()).grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert_untouched(model)
    (tuned, optimizer) = pickled(copy.deepcopy((tuned, optimizer)))
    model = tuned.model
    train(model, optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    assert_untouched(model)
    with tuned.released() as plain:
        masks.append(mask_over_all(plain, 0.2))
    tuned.remask(masks[-1], on_leave="restore", optimizer=optimizer)
    train(model, optimizer)
    attached = torch.optim.RMSprop(tuned.parameters(), lr=0.01)
    tuned.attach(attached)
    train(model, attached)
    assert_untouched(model)
    assert not same_bits(model.state_dict()["conv.weight"], base["conv.weight"])
    ff.save_delta(tuned, tmp_path / "delta.safetensors")
    trained = state_of(tuned.release())
    delta, fresh = ff.load_delta(tmp_path / "delta.safetensors"), net().to(dtype)
    delta.apply_(fresh)
    assert_state(fresh, trained)
    assert_untouched(fresh)
    delta.revert_(fresh)
    assert_state(fresh, base)
