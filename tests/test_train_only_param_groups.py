"""Param groups go by the weights' own shapes and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fishfast as ff


def tuned_model() -> ff.SparseTuning:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    return ff.train_only(model, ff.random_mask(model, k=60, seed=0, keep="2"))


def by_name(tuned: ff.SparseTuning, groups: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    names = {id(p): n.removesuffix("_values") for n, p in tuned.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group.get("lr")) for group in groups
        for p in group["params"]
    }  # fmt: skip


def test_matrices_decay_and_vectors_do_not() -> None:
    tuned = tuned_model()
    found = by_name(tuned, tuned.param_groups(weight_decay=0.1))
    assert found == {
        "0.weight": (0.1, None), "0.bias": (0.0, None), "1.weight": (0.0, None),
        "1.bias": (0.0, None), "2.weight": (0.1, None), "2.bias": (0.0, None),
    }  # fmt: skip


def test_the_head_has_its_own_rate_and_names_are_spared() -> None:
    tuned = tuned_model()
    found = by_name(tuned, tuned.param_groups(0.1, head_lr=0.5, no_decay=["0"]))
    assert found == {
        "0.weight": (0.0, None), "0.bias": (0.0, None), "1.weight": (0.0, None),
        "1.bias": (0.0, None), "2.weight": (0.1, 0.5), "2.bias": (0.0, 0.5),
    }  # fmt: skip
    named = by_name(tuned, tuned.param_groups(0.1, head_lr=0.5, head=["1", "2.bias"]))
    assert {name for name, (_, lr) in named.items() if lr} == {"1.weight", "1.bias", "2.bias"}


@pytest.mark.parametrize("optimizer_class", [ff.AdamW, torch.optim.AdamW])
def test_a_step_of_the_groups_is_that_of_a_dense_model(optimizer_class: Any) -> None:
    """Every weight masked, so the dense model's usual groups are the oracle."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model.load_state_dict(plain.state_dict())
    tuned = ff.train_only(model, ff.random_mask(model, density=1.0, seed=0))
    dense = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    for net, groups, cls in (
        (plain, dense, torch.optim.AdamW),
        (model, tuned.param_groups(weight_decay=0.1), optimizer_class),
    ):
        optimizer = cls(groups, lr=0.1)
        net(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
    for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weight_decay": -1.0}, r"weight_decay must be at least 0; got -1\.0"),
        ({"head_lr": float("nan")}, "head_lr must be at least 0; got nan"),
        ({"head": "2"}, "head goes with head_lr; got head='2' alone"),
        ({"no_decay": "nothing"}, "no_decay entry 'nothing' matches no parameter"),
    ],
)
def test_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tuned_model().param_groups(**arguments)


def test_a_head_rate_without_a_head_is_refused() -> None:
    model = nn.Linear(8, 8)
    tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
    with pytest.raises(ValueError, match="head_lr needs weights that are masked whole"):
        tuned.param_groups(head_lr=0.1)
