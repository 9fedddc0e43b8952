"""What train_only refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import mask_of
from torch import nn
from torch.nn.utils import parametrizations, prune
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
    "lazy": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False)),
        lambda m: ff.SparseMask({"0.weight": torch.arange(2)}, {"0.weight": (3, 4)}),
        ValueError,
        "model must have all of its weights; '1.running_mean' of a LazyBatchNorm1d gets its shape "
        "from the first forward; run the model on a batch first",
    ),
    "mask of before the pruning": (
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", amount=2),
        lambda m: ff.random_mask(nn.Linear(4, 3), k=3, seed=0),
        ValueError,
        "it names 'weight', which the model does not have, but computes from 'weight_orig'; make "
        "the mask of this model, or call torch.nn.utils.prune.remove",
    ),
    "mask of before the parametrization": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
        lambda m: ff.random_mask(nn.Linear(4, 3), k=3, seed=0),
        ValueError,
        "but computes from 'parametrizations.weight.original'; make the mask of this model, or "
        "call torch.nn.utils.parametrize.remove_parametrizations",
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


def test_what_makes_masks_refuses_a_lazy_model() -> None:
    batches = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))]
    makers: list[Callable[[nn.Module], Any]] = [
        lambda model: ff.estimate_fisher(model, batches),
        ff.magnitude_scores,
        lambda model: ff.random_mask(model, k=1, seed=0),
        ff.bias_mask,
    ]
    for make in makers:
        model = nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d())
        with pytest.raises(ValueError, match=r"'1\.weight' of a LazyBatchNorm1d gets its shape"):
            make(model)
        assert model[1].has_uninitialized_params()


def test_a_pruned_model_is_trained_where_it_is_not_pruned() -> None:
    torch.manual_seed(0)
    model = prune.l1_unstructured(nn.Linear(4, 3), "weight", amount=5)
    pruned = model.weight_mask == 0
    batches = [(torch.randn(8, 4), torch.arange(8) % 3)]

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    fisher = ff.estimate_fisher(model, batches, loss_fn=loss_fn)
    assert (fisher["weight_orig"][pruned] == 0).all()
    before = model.weight_orig.detach().clone()
    tuned = ff.train_only(model, ff.top_k_mask(fisher, k=9))
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    loss_fn(model, batches[0]).mean().backward()
    optimizer.step()
    assert torch.equal(model.weight_orig[pruned], before[pruned])
    assert not torch.equal(model.weight_orig, before)
    model(batches[0][0])
    assert torch.equal(model.weight, model.weight_orig * model.weight_mask)


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
    refused = pytest.raises(RuntimeError, match="must be called outside inference_mode")
    with torch.inference_mode(), refused:
        ff.train_only(model, mask)
    assert picture(model) == before


def test_something_that_is_no_module_is_refused() -> None:
    mask = mask_over_all(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got dict"):
        ff.train_only({}, mask)
