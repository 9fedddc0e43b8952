"""Deltas: bit-exact on and off, on any base that is the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_net import Net, images, train, trained
from stepping import assert_state, mask_of, same_bits, state_of
from torch import nn

import fishfast as ff


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_and_revert_are_bit_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    tuned = trained(dtype)
    ff.save_delta(tuned, tmp_path / "d")
    base = Net().to(dtype)
    before = state_of(base)
    delta = ff.load_delta(tmp_path / "d")
    assert delta.num_selected == tuned.num_selected
    assert delta.mask == tuned.mask
    for _ in range(2):
        assert delta.apply_(base) is base
        assert_state(base, state_of(tuned.model))
        with torch.no_grad():
            assert same_bits(base.eval()(images(9, dtype)), tuned.model.eval()(images(9, dtype)))
        base.train()
        assert base.again.weight is base.first.weight
        assert delta.revert_(base) is base
        assert_state(base, before)
    changed = [n for n, t in before.items() if not same_bits(tuned.model.state_dict()[n], t)]
    assert {"conv.weight", "head.weight", "norm.running_mean", "norm.num_batches_tracked"} <= set(
        changed
    )


def assert_goes_on_and_off(path: Path, base: nn.Module, expected: nn.Module) -> None:
    before = state_of(base)
    delta = ff.load_delta(path)
    delta.apply_(base)
    assert_state(base, state_of(expected))
    delta.revert_(base)
    assert_state(base, before)


def test_base_with_another_fresh_head_is_the_base(path: Path, tuned: ff.SparseTuning) -> None:
    assert_goes_on_and_off(path, Net(head_seed=99), tuned.model)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_base_in_another_memory_layout(path: Path, tuned: ff.SparseTuning, layout: str) -> None:
    base = Net()
    if layout == "channels_last":
        base.to(memory_format=torch.channels_last)
    else:
        base.head.weight = nn.Parameter(base.head.weight.detach().t().contiguous().t())
    assert_goes_on_and_off(path, base, tuned.model)


def test_buffers_that_overlap_in_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.register_buffer("whole", torch.zeros(4))
        model.register_buffer("part", model.whole[:2])
        return model

    model = make()
    tuned = ff.train_only(model, mask_of(model, {"bias": torch.arange(2)}))
    model.whole += 1.0
    ff.save_delta(tuned, tmp_path / "d")
    other = make()
    ff.load_delta(tmp_path / "d").apply_(other)
    assert torch.equal(other.whole, torch.ones(4))
    assert torch.equal(other.part, torch.ones(2))


def test_disjoint_deltas_stack_without_the_base_check(tmp_path: Path) -> None:
    everything = ff.random_mask(Net(), density=0.6, seed=0)
    halves = [
        mask_of(Net(), {name: found[part::2] for name, found in everything.items()})
        for part in range(2)
    ]
    deltas, models = [], []
    for part, mask in enumerate(halves):
        model = Net().eval()
        tuned = ff.train_only(model, mask)
        train(tuned)
        ff.save_delta(tuned, tmp_path / str(part))
        deltas.append(ff.load_delta(tmp_path / str(part)))
        models.append(model)
    base = Net()
    before = state_of(base)
    deltas[0].apply_(base)
    with pytest.raises(ValueError, match="another base model: its weights or buffers differ"):
        deltas[1].apply_(base)
    assert_state(base, state_of(models[0]))
    deltas[1].apply_(base, check_base=False)
    for mask, model in zip(halves, models, strict=True):
        for name, found in mask.items():
            ours = base.state_dict()[name].flatten()[found.long()]
            assert same_bits(ours, model.state_dict()[name].flatten()[found.long()])
    deltas[0].revert_(base)  # disjoint: the order does not matter
    deltas[1].revert_(base)
    assert_state(base, before)


def test_several_models_have_the_same_delta(path: Path, tuned: ff.SparseTuning) -> None:
    delta = ff.load_delta(path)
    first, second = Net(), Net(head_seed=3)
    befores = state_of(first), state_of(second)
    delta.apply_(first)
    delta.apply_(second)
    delta.revert_(first)
    assert_state(first, befores[0])
    assert_state(second, state_of(tuned.model))
    delta.revert_(second)
    assert_state(second, befores[1])


def test_model_under_train_only(path: Path, tuned: ff.SparseTuning, tmp_path: Path) -> None:
    model = Net(head_seed=1)
    other = ff.train_only(model, ff.random_mask(model, density=0.5, seed=8))
    delta = ff.load_delta(path)
    delta.apply_(model)
    assert_state(model, state_of(tuned.model))
    for parameter in other.parameters():  # the masters follow
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(other.parameters(), lr=0.1).step()
    assert_state(model, state_of(tuned.model))
    delta.revert_(model)
    delta.apply_(model)
    train(other, 1)
    with pytest.raises(RuntimeError, match="not on top: .* was changed after apply_"):
        delta.revert_(model)


def test_whole_mask_of_a_bare_scalar_and_an_empty_parameter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.scale = nn.Parameter(torch.tensor(2.0))
        model.nothing = nn.Parameter(torch.empty(0, 3))
        return model

    model = make()
    tuned = ff.train_only(model, mask_of(model, {"scale": torch.arange(1)}))
    (model.scale * 3).backward()
    ff.SGD(tuned.parameters(), lr=1.0).step()
    ff.save_delta(tuned, tmp_path / "d")
    other = make()
    ff.load_delta(tmp_path / "d").apply_(other)
    assert other.scale.item() == -1.0


def test_sparse_buffers_belong_to_the_base(tmp_path: Path) -> None:
    def make(scale: float) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        model.register_buffer("adjacency", scale * torch.eye(3).to_sparse())
        return model

    model = make(1.0)
    ff.save_delta(ff.train_only(model, ff.random_mask(model, k=3, seed=0)), tmp_path / "d")
    ff.load_delta(tmp_path / "d").apply_(make(1.0))
    with pytest.raises(ValueError, match="another base model"):
        ff.load_delta(tmp_path / "d").apply_(make(2.0))
