"""A tuned model that other code changed: followed, or refused by name, never passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import assert_state, mask_of
from torch import nn
from train_only_net import tuned_net

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
