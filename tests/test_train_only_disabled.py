"""The base model within ``tuned.disabled()``, and the trained one after it, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from stepping import assert_state, mask_of, same_bits, state_of
from torch import nn
from train_only_net import assert_masters_match, net, numbers, train, tuned_net

import fishfast as ff


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_base_within_the_block_and_the_trained_model_after(dtype: torch.dtype) -> None:
    tuned = tuned_net()
    tuned.model.to(dtype).eval()
    tuned.rebase()
    model, base = tuned.model, state_of(tuned.model)
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    train(model, optimizer)
    trained, masters = state_of(model), [p.detach().clone() for p in tuned.parameters()]
    images = numbers(2, 3, 6, 6).to(dtype)
    with torch.no_grad():
        expected = model(images)
        with tuned.disabled() as lent:
            assert lent is model
            assert_state(model, base)
            assert not any(p.requires_grad for p in tuned.parameters())
            reference = model(images)
        assert same_bits(model(images), expected)
        plain = copy.deepcopy(model)
        plain.load_state_dict(base)
        assert same_bits(reference, plain(images))
    assert_state(model, trained)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))
    assert all(p.requires_grad for p in tuned.parameters())
    assert_masters_match(model)


def test_a_loss_with_the_reference_in_it_has_the_right_gradient() -> None:
    """As in DPO: the policy's forward, the reference's, then the policy's backward."""
    tuned, images = tuned_net(), numbers(2, 3, 6, 6)
    model, base = tuned.model.eval(), net().eval()
    base.load_state_dict(state_of(tuned.model))
    train(model, ff.SGD(tuned.parameters(), lr=0.1))
    policy = model(images)
    with tuned.disabled(), torch.no_grad():
        reference = model(images)
    tuned.model.zero_grad()
    (policy - reference).square().sum().backward()
    grads = [p.grad.clone() for p in tuned.parameters()]
    tuned.model.zero_grad()
    (model(images) - base(images).detach()).square().sum().backward()
    assert all(same_bits(g, p.grad) for g, p in zip(grads, tuned.parameters(), strict=True))


def test_backward_within_the_block_is_refused() -> None:
    tuned = tuned_net()
    before = state_of(tuned.model)
    loss = tuned.model(numbers(2, 3, 6, 6)).sum()
    with pytest.raises(RuntimeError, match=r"cannot run within tuned\.disabled"), tuned.disabled():
        loss.backward()
    weights = {n: t for n, t in before.items() if "running" not in n and "num_b" not in n}
    assert all(same_bits(tuned.model.state_dict()[n], t) for n, t in weights.items())
    tuned.model(numbers(2, 3, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_blocks_do_not_nest_and_need_a_tuned_model() -> None:
    tuned = tuned_net()
    with tuned.disabled(), pytest.raises(RuntimeError, match="is the base already"):
        tuned.disabled().__enter__()
    with tuned.released(), pytest.raises(RuntimeError, match="the model is released"):
        tuned.disabled().__enter__()


def test_values_written_meanwhile_and_frozen_ones() -> None:
    tuned = tuned_net()
    first, *others = tuned.parameters()
    first.requires_grad_(False)
    with tuned.disabled(), torch.no_grad():
        others[0].fill_(7.0)
    tuned.model.state_dict()  # reads
    assert_masters_match(tuned.model)
    assert others[0].eq(7).all()
    assert [p.requires_grad for p in tuned.parameters()] == [False] + [True] * len(others)


def test_weights_of_former_masks_have_the_base_values_too() -> None:
    model = nn.Linear(4, 4)
    base = state_of(model)
    tuned = ff.train_only(model, mask_of(model, {"weight": torch.tensor([0, 5])}))
    optimizer = ff.SGD(tuned.parameters(), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with tuned.released() as plain:
        later = mask_of(plain, {"weight": torch.tensor([5, 6])})
    tuned.remask(later, optimizer=optimizer)
    trained = state_of(model)
    with tuned.disabled():
        assert_state(model, base)
    assert_state(model, trained)
