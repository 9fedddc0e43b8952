"""A tuned model that other code changed: followed, or refused by name, never passed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import assert_state, mask_of, state_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train_only_modules import TiedNet
from train_only_net import train, tuned_net

import fishfast as ff


def two_layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def chosen(model: nn.Module, **indices: list[int]) -> ff.SparseMask:
    """Return a mask; ``first_weight`` stands for ``0.weight``."""
    layers = {"first": "0", "second": "1"}
    by_name = {}
    for name, found in indices.items():
        layer, _, own = name.partition("_")
        by_name[f"{layers[layer]}.{own}"] = torch.tensor(found)
    return mask_of(model, by_name)


@pytest.mark.parametrize("later", [[1], [1, 7]], ids=["subset", "beyond the union"])
def test_restore_puts_no_values_into_another_base(later: list[int]) -> None:
    model = two_layers()
    tuned = ff.train_only(model, chosen(model, first_weight=[1, 2, 5]))
    other = {name: weight + 1 for name, weight in model.state_dict().items()}
    mask = chosen(two_layers(), first_weight=later)
    model.load_state_dict(other)
    with pytest.raises(RuntimeError, match=r"outside the mask.*DistributedData.*tuned\.rebase"):
        tuned.remask(mask, "restore")
    assert_state(model, other)
    tuned.rebase()
    tuned.remask(mask, "restore")
    assert_state(model, other)


@pytest.mark.parametrize("optimizer_class", [ff.AdamW, torch.optim.SGD])
def test_names_in_the_optimizer_follow_a_remask(optimizer_class: Any) -> None:
    model = two_layers()
    tuned = ff.train_only(model, chosen(model, first_weight=[0, 3], second_weight=[1]))
    optimizer = optimizer_class(tuned.named_parameters(), lr=0.1)
    mask = chosen(two_layers(), first_bias=[0], second_weight=[1, 2], second_bias=[2])
    tuned.remask(mask, optimizer=optimizer)
    expected = [name for name, _ in tuned.named_parameters()]
    assert len(expected) == 3
    assert optimizer.param_groups[0]["param_names"] == expected
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == expected
    again = optimizer_class(tuned.named_parameters(), lr=0.1)
    again.load_state_dict(optimizer.state_dict())


def test_names_that_the_user_chose_stay() -> None:
    model = two_layers()
    tuned = ff.train_only(model, chosen(model, first_weight=[0, 3], second_weight=[1]))
    first, second = tuned.parameters()
    extra = nn.Parameter(torch.zeros(2))
    optimizer = ff.SGD(
        [
            {"params": [("b", second), ("extra", extra)]},
            {"params": [("a", first)], "lr": 0.5},
        ],
        lr=0.1,
    )
    mask = chosen(two_layers(), first_bias=[0], second_weight=[2])
    tuned.remask(mask, optimizer=optimizer, param_group=lambda name: 0)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.bias_values", "b", "extra"], []]
    assert optimizer.param_groups[0]["params"][2] is extra


def test_weights_assigned_to_the_lent_model_stay_frozen() -> None:
    tuned = tuned_net()
    state = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    with tuned.released() as plain:
        plain.load_state_dict(state, assign=True)
        with torch.no_grad():
            plain.again.weight = plain.first.weight
    trained = [name for name, p in tuned.model.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in tuned.named_parameters()]


class Double(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


@pytest.mark.parametrize("what", ["release", "remask", "released", "removed"])
@pytest.mark.parametrize("first", ["masked", "parametrized"])
def test_another_parameter_of_a_masked_layer_is_parametrized(first: str, what: str) -> None:
    """Torch puts a class of its own upon the layer's, before or after ours."""
    model, twin = two_layers(), two_layers()
    parametrize.register_parametrization(twin[0], "bias", Double())
    if first == "parametrized":
        parametrize.register_parametrization(model[0], "bias", Double())
    tuned = ff.train_only(model, chosen(model, first_weight=[0, 3], second_weight=[1]))
    if first == "masked":
        parametrize.register_parametrization(model[0], "bias", Double())
    if what == "remask":
        with tuned.released() as plain:
            mask = chosen(plain, first_weight=[3])
        if first == "masked":  # the base had other names
            with pytest.raises(
                RuntimeError, match="names, dtypes or shapes changed since train_only"
            ):
                tuned.remask(mask)
        else:
            tuned.remask(mask)
    if what == "released":
        with tuned.released():
            pass
    if what == "removed":
        for layer in (model[0], twin[0]):
            parametrize.remove_parametrizations(layer, "bias")
        assert type(twin[0]) is nn.Linear
    x = torch.ones(2, 4)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    values = next(tuned.parameters())
    chosen_now = tuned.mask["0.weight"].long()
    assert torch.allclose(values.grad, twin[0].weight.grad.flatten()[chosen_now])
    ff.SGD(tuned.parameters(), lr=0.1).step()
    with torch.no_grad():
        trained = model(x)
        tuned.release()
        assert torch.equal(model(x), trained)
    assert [c.__name__ for c in type(model[0]).__mro__] == [
        c.__name__ for c in type(twin[0]).__mro__
    ]
    if what != "removed":
        parametrize.remove_parametrizations(model[0], "bias")
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model[0].named_parameters()] == ["weight", "bias"]


def test_copy_of_a_parametrized_masked_layer_trains_alone() -> None:
    model = two_layers()
    tuned = ff.train_only(model, chosen(model, first_weight=[0, 3]))
    parametrize.register_parametrization(model[0], "bias", Double())
    before = state_of(model)
    copied = copy.deepcopy(tuned)
    copied.model(torch.ones(2, 4)).sum().backward()
    ff.SGD(copied.parameters(), lr=1.0).step()
    copied.release()
    assert_state(model, before)
    assert not torch.equal(copied.model[0].weight, before["0.weight"])
    model(torch.ones(2, 4)).sum().backward()
    assert next(tuned.parameters()).grad is not None


def test_a_tie_made_later_is_named(tmp_path: Path) -> None:
    """The new owner is a plain module, so its part of the gradient has no way to the values."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    mask = mask_of(model, {"embed.weight": torch.arange(20)})
    tuned = ff.train_only(model, mask)
    before = tuned.report()
    own = model.head.weight
    with torch.no_grad():
        model.head.weight = model.embed.weight
    base, union = tuned.base, tuned.trained_mask
    calls: list[Callable[[], Any]] = [
        tuned.report,
        tuned.rebase,
        tuned.identify,
        lambda: tuned.remask(mask),
        lambda: ff.save_delta(tuned, tmp_path / "d"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"'head\.weight' was tied to 'embed\.weight'"):
            call()
    assert tuned.base is base
    assert tuned.trained_mask is union
    model.head.weight = own
    assert tuned.report() == before


def test_a_later_tie_of_weights_without_a_mask_is_named(tmp_path: Path) -> None:
    model = TiedNet()
    model.norm = nn.LayerNorm(11)
    model.third = nn.Linear(6, 11, bias=False)
    tuned = ff.train_only(model, mask_of(model, {"norm.weight": torch.arange(3)}))
    ff.save_delta(tuned, tmp_path / "before")
    shared, own = model.embed.weight, model.third.weight
    model.third.weight = shared
    with pytest.raises(
        RuntimeError, match=r"; 'third\.weight' was tied to 'embed\.weight' after it"
    ):
        ff.save_delta(tuned, tmp_path / "after")
    model.third.weight, model.head.weight = own, nn.Parameter(shared.detach().clone())
    with pytest.raises(
        RuntimeError, match=r"; 'head\.weight' was untied from 'embed\.weight' afte"
    ):
        ff.save_delta(tuned, tmp_path / "after")
    model.head.weight = shared
    ff.save_delta(tuned, tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_weights_tied_again_are_no_new_tie() -> None:
    model = TiedNet()
    tuned = ff.train_only(model, mask_of(model, {"embed.weight": torch.arange(9)}))
    with torch.no_grad():
        model.head.weight = model.embed.weight
    assert "embed.weight" in tuned.report()
    tuned.rebase()


@pytest.mark.parametrize("make", ["fishfast", "attached"])
def test_no_step_of_a_released_model(make: str) -> None:
    tuned = tuned_net()
    model = tuned.model
    if make == "attached":
        optimizer: Any = torch.optim.SGD(tuned.parameters(), lr=0.1)
        tuned.attach(optimizer)
    else:
        optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    train(model, optimizer)
    before = state_of(model)
    with tuned.released():
        with pytest.raises(
            RuntimeError, match=r"'conv\.weight' does not train within .* after the"
        ):
            optimizer.step()
        assert_state(model, before)
    train(model, optimizer)
    tuned.release()
    before = state_of(model)
    for again in (False, True):
        if again:
            ff.train_only(model, tuned.mask)
        text = (
            r"got those of 'conv\.weight' from before release\(\); make a new optimizer"
            if again
            else r"'conv\.weight' does not train any more: .*; to go on, call train_only again"
        )
        with pytest.raises(RuntimeError, match=text):
            optimizer.step()
        assert_state(model, before)
    optimizer.state_dict()  # a checkpoint of it can still be saved


def test_a_masked_weight_is_not_set_to_none() -> None:
    model = two_layers()
    tuned = ff.train_only(model, chosen(model, first_weight=[0]))
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"'0\.weight' must be a tensor; got None; release"):
        model[0].weight = None
    assert_state(model, before)
    model[0].bias = None  # which has no mask
    model(torch.ones(1, 4)).sum().backward()
    assert next(tuned.parameters()).grad is not None


class DTensor(nn.Parameter):
    """Stands for torch's, which takes two seconds to import and needs a process group."""


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (DTensor, r"cannot be sharded; fully_shard put .* values of '0\.weight'; use Distributed"),
        (
            nn.Parameter,
            r"values of '0\.weight' must be a compact parameter; got Parameter in their",
        ),
    ],
)
def test_values_that_were_replaced_are_named(other: Any, text: str) -> None:
    model = two_layers()
    tuned = ff.train_only(model, chosen(model, first_weight=[0]))
    optimizer = ff.SGD(tuned.parameters(), lr=0.1)
    model[0]._parameters["weight_values"] = other(torch.zeros(1))
    for call in (lambda: list(tuned.parameters()), optimizer.step):
        with pytest.raises(RuntimeError, match=text):
            call()
