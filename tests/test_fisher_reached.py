"""Losses that reach none of the model's parameters, or not all of them."""

from __future__ import annotations

import copy
import warnings

import models
import pytest
import torch
from fisher_checks import BATCH, assert_same_state, state_of
from models import classify
from torch import nn

import fishfast as ff


def another_copy(model):
    return copy.deepcopy(model)


def with_its_own_tensors(model):
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return lambda x: torch.func.functional_call(model, values, (x,))


def sharing_no_parameters(model):
    """As FSDP with use_orig_params: the weights that are used are views of another tensor."""
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))

    def run(x):
        sizes = [p.numel() for p in model.parameters()]
        views = zip(model.named_parameters(), flat.split(sizes), strict=True)
        values = {name: view.view_as(p) for (name, p), view in views}
        return torch.func.functional_call(model, values, (x,))

    return run


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("other", [another_copy, with_its_own_tensors, sharing_no_parameters])
def test_losses_of_another_model_are_refused(other, size):
    model = models.mlp().model
    prepared = other(model)
    before = state_of(model)
    batch = tuple(part[:size] for part in BATCH)
    names = ", ".join(repr(name) for name, _ in list(model.named_parameters())[:3])
    with pytest.raises(ValueError, match=f"none reaches {names}.* not another copy of it"):
        ff.estimate_fisher(model, [batch], loss_fn=lambda _, b: classify(prepared, b))
    assert_same_state(before, state_of(model))


def test_outputs_of_another_model_are_refused():
    model = models.mlp().model
    prepared = copy.deepcopy(model)
    with pytest.raises(ValueError, match="losses must depend on the model's parameters"):
        ff.estimate_fisher(
            model, [BATCH], fisher_type="exact", outputs_fn=lambda _, b: prepared(b[0])
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_model_that_fsdp_shards_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = models.mlp().model
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises((ValueError, TypeError), match="FSDP|DTensor"):
            ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    finally:
        torch.distributed.destroy_process_group()


class TwoParts(nn.Module):
    """One part is called; the other one is only there, or a copy of it is called."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.pooler = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 5)
        self.others = []

    def forward(self, x):
        x = torch.tanh(self.body(x))
        for other in self.others:
            x = other(x)
        return self.head(x)


def test_parameters_that_are_not_reached_though_others_are():
    model = TwoParts()
    model.others = [copy.deepcopy(model.pooler)]
    with pytest.warns(UserWarning, match="no loss reaches 'pooler.weight', 'pooler.bias', whose"):
        fisher = ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    expected = "not reached by losses that reach other tensors"
    assert fisher.roads["pooler.weight"] == fisher.roads["pooler.bias"] == expected
    assert fisher.roads["body.weight"] == "batched"
    assert not fisher["pooler.weight"].any()


def test_parameters_that_are_not_used_are_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = ff.estimate_fisher(TwoParts(), [BATCH], loss_fn=classify)
    assert fisher.roads["pooler.weight"] == "not used"


def test_a_batch_with_a_gradient_of_its_own_is_no_other_model():
    """Where all parameters are reached, what else is does not matter."""
    model = models.mlp().model
    inputs = BATCH[0].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher = ff.estimate_fisher(model, [(inputs, BATCH[1])], loss_fn=classify)
    expected = ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    assert inputs.grad is None
