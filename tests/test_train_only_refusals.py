"""What train_only refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import mask_of
from torch import nn
from train_only_modules import mask_over_all
from train_only_net import tuned_net

import fishfast as ff


class Clash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.weight_values = torch.ones(4)


def picture(model: nn.Module) -> list[Any]:
    """Everything that a refusal must leave alone."""
    return [
        (
            name,
            type(module),
            module.training,
            sorted(vars(module)),
            list(module._forward_hooks),
            [(n, id(p), p.requires_grad, id(p.grad)) for n, p in module.named_parameters()],
        )
        for name, module in model.named_modules()
    ]


def expanded() -> nn.Module:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.ones(1, 4).expand(3, 4))
    return model


def overlapping() -> nn.Module:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.ones(12).as_strided((3, 4), (2, 1)))
    return model


def mixed(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype), requires_grad=False)
    return model


def meta_head() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta"))


def renamed(model: nn.Module) -> ff.SparseMask:
    return ff.SparseMask({"nothing": torch.arange(2)}, {"nothing": (4,)})


def reshaped(model: nn.Module) -> ff.SparseMask:
    return ff.SparseMask({"weight": torch.arange(2)}, {"weight": (4, 3)})


REFUSALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[Exception], str]] = {
    "no mask": (
        lambda: nn.Linear(4, 3),
        lambda m: {"weight": torch.arange(2)},
        TypeError,
        "mask must be a SparseMask; got dict",
    ),
    "empty mask": (
        lambda: nn.Linear(4, 3),
        lambda m: mask_of(m, {}),
        ValueError,
        "mask must select at least one weight; got an empty mask",
    ),
    "unknown name": (
        lambda: nn.Linear(4, 3),
        renamed,
        ValueError,
        "mask must fit the model; it names 'nothing'",
    ),
    "other shape": (
        lambda: nn.Linear(4, 3),
        reshaped,
        ValueError,
        r"'weight' has shape \(4, 3\) in the mask and \(3, 4\)",
    ),
    "float64": (
        lambda: mixed(torch.float64),
        mask_over_all,
        ValueError,
        "masked weights must be float32, bfloat16 or float16; got torch.float64 for '1.weight'",
    ),
    "int": (
        lambda: mixed(torch.int32),
        mask_over_all,
        ValueError,
        "got torch.int32 for '1.weight'",
    ),
    "meta": (meta_head, mask_over_all, ValueError, "'1.weight' is on the meta device"),
    "meta, not masked": (
        meta_head,
        lambda m: mask_of(m, {"0.weight": torch.arange(3)}),
        ValueError,
        "'1.weight' is on the meta device",
    ),
    "expanded": (
        expanded,
        mask_over_all,
        ValueError,
        "must not be expanded; 'weight' has stride 0",
    ),
    "overlapping": (overlapping, mask_over_all, ValueError, "must not overlap in memory; 'weight'"),
    "attribute in the way": (
        Clash,
        mask_over_all,
        ValueError,
        "must not have an attribute 'weight_values' beside 'weight'",
    ),
    "scripted": (
        lambda: torch.jit.script(nn.Linear(4, 3)),
        mask_over_all,
        TypeError,
        "torch.jit",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_changes_nothing(name: str) -> None:
    make, make_mask, error, message = REFUSALS[name]
    model = make().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    mask = make_mask(model)
    before = picture(model)
    with pytest.raises(error, match=message):
        ff.train_only(model, mask)
    assert picture(model) == before


class NotToBeDerived(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("cannot be derived from")


def test_failure_half_way_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), NotToBeDerived(3, 2))
    before = picture(model)
    with pytest.raises(TypeError, match="cannot be derived from"):
        ff.train_only(model, mask_over_all(model))
    assert picture(model) == before


def test_second_train_only_is_refused() -> None:
    tuned = tuned_net()
    before = picture(tuned.model)
    with pytest.raises(RuntimeError, match=r"model has a mask already; call release\(\)"):
        ff.train_only(tuned.model, tuned.mask)
    assert picture(tuned.model) == before


def test_inference_mode_is_refused() -> None:
    model = nn.Linear(2, 2)
    mask, before = mask_over_all(model), picture(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="not be called in inference"):
        ff.train_only(model, mask)
    assert picture(model) == before


def test_something_that_is_no_module_is_refused() -> None:
    mask = mask_over_all(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got dict"):
        ff.train_only({}, mask)
