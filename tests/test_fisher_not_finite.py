"""Losses, gradients and scores that are not finite: refused by name, and nothing is added."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_same_state, state_of
from models import CASES, classify, huggingface
from torch import nn

import fishfast as ff


def with_root(model, batch):
    """The square root of zero has an infinite gradient, where the loss is finite."""
    x, y = batch
    penalty = model(x).square().sum(1) * (x[:, 0] != 7)
    return F.cross_entropy(model(x), y, reduction="none") + penalty.sqrt()


def finite_and_not(size=4, bad=2):
    x, y = torch.randn(size, 6), torch.randint(0, 4, (size,))
    spoiled = x.clone()
    spoiled[bad, 0] = 7
    return (x, y), (spoiled, y)


def test_a_gradient_that_is_not_finite_names_its_sample_and_parameter():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    good, bad = finite_and_not()
    before = state_of(model)
    assert torch.isfinite(with_root(model, bad)).all()
    with pytest.raises(ValueError, match=r"that of '\d.\w+' is not for sample 2 of the batch"):
        ff.estimate_fisher(model, [good, bad], loss_fn=with_root)
    assert_same_state(before, state_of(model))


def test_a_sample_with_nan_is_named():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    (x, y), _ = finite_and_not()
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="finite losses; got nan for sample 3"):
        ff.estimate_fisher(model, [(x, y)], loss_fn=classify)


def test_a_weight_with_nan_is_refused():
    case = huggingface("bert")
    with torch.no_grad():
        case.model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite losses; got nan for sample 0"):
        ff.estimate_fisher(case.model, case.batches)


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_nothing_of_a_batch_that_is_not_finite_is_accumulated(tmp_path, kind):
    """The running scores are those of the batches before; the run goes on from there."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    good, bad = finite_and_not()
    if kind == "loss":
        bad[0][2, 1] = torch.nan
    path = tmp_path / "running"
    options = {"loss_fn": with_root, "resume_path": path, "save_every": 0}
    earlier = ff.estimate_fisher(model, [good], loss_fn=with_root)
    kept = {name: values.clone() for name, values in earlier.items()}
    with pytest.raises(ValueError, match="finite"):
        ff.estimate_fisher(model, [good, bad, good], **options)
    saved = ff.Fisher.load(path)
    assert (saved.num_samples, saved.num_batches) == (4, 1)
    for name, values in kept.items():
        assert torch.equal(saved[name], values)
        assert torch.equal(earlier[name], values)
    resumed = ff.estimate_fisher(model, [good, good, good], **options)
    whole = ff.estimate_fisher(model, [good, good, good], loss_fn=with_root)
    assert resumed.num_samples == 12
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_gradient_that_is_not_finite_where_nothing_is_batched():
    """The fallback names the sample too."""
    case = CASES["recurrent_time_first"]()
    x = case.batches[0]
    x[1] = 7

    def loss_fn(model, x):
        return (model(x).square().sum(1) * (x[:, 0, 0] != 7)).sqrt()

    with pytest.raises(ValueError, match="is not for sample 1 of the batch"):
        ff.estimate_fisher(case.model, [x], loss_fn=loss_fn)


def test_scores_that_overflow_name_no_sample():
    model = nn.Linear(6, 4)
    good, _ = finite_and_not()
    with pytest.raises(ValueError, match=r"above 1.8e19.* scale the losses down"):
        ff.estimate_fisher(model, [good], loss_fn=lambda m, b: classify(m, b) * 1e25)
