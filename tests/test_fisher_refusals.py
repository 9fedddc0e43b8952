"""What `estimate_fisher` refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

import collections

import models
import pytest
import torch
import torch.nn.functional as F
from fisher_checks import BATCH, assert_same_state, decorated, state_of
from models import classify
from torch import nn

import fishfast as ff


def nan_losses(model, batch):
    losses = classify(model, batch)
    return losses * torch.tensor([1, 1, torch.nan, 1])


def infinite_gradients(model, batch):
    return (model(batch[0]).square().sum(1) * 0).sqrt()


def overflowing_gradients(model, batch):
    return classify(model, batch) * 1e25


def mean_expanded(model, batch):
    losses = classify(model, batch)
    return losses.mean().expand(len(losses))


def mean_repeated(model, batch):
    losses = classify(model, batch)
    return losses.mean().repeat(len(losses))


def contrastive(model, batch):
    out = model(batch[0])
    return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


def neighbours(model, batch):
    out = model(batch[0])
    return (out - out.roll(1, 0)).square().sum(1)


def two_halves(model, batch):
    """Four losses, each between a sample and the one half a batch away."""
    out = model(batch[0])
    return (out - out.roll(2, 0)).square().sum(1)


def history(model, batch):
    """Each loss reads the samples before its own; nobody reads the last one, the largest."""
    out = model(batch[0]).cumsum(0)
    return out.square().sum(1) * torch.tensor([1, 1, 1, 1000])


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda m, b: classify(m, b).mean(), r"shape \[B\]; got a scalar; use reduction='none'"),
        (lambda m, b: m(b[0])[:, :1], r"shape \[B\]; got shape \(4, 1\); use reduction='none'"),
        (lambda m, b: m(b[0]), r"shape \[B\]; got shape \(4, 4\)"),
        (lambda m, b: m(b[0]).flatten(), "got 16 losses for a batch of 4 .one per token"),
        (lambda m, b: classify(m, b).tolist(), "a tensor of per-sample losses; got list"),
        (lambda m, b: None, "a tensor of per-sample losses; got NoneType"),
        (lambda m, b: classify(m, b).detach(), "got 4 losses with requires_grad=False"),
        (lambda m, b: classify(m, b)[:0], "batches must give at least one sample; got none"),
        (nan_losses, "must return finite losses; got nan for sample 2"),
        (lambda m, b: classify(m, b) / 0, "must return finite losses; got inf for sample 0"),
        (infinite_gradients, r"that of '\d.\w+' is not for sample \d of the batch; nothing of it"),
        (overflowing_gradients, "scores must be finite; .* above 1.8e19.*; scale the losses down"),
        (lambda m, b: classify(m, b).mean()[None], "got 1 losses for a batch of 4 .their mean"),
        (mean_expanded, "depend on one sample each; got one value expanded to 4; use reduction="),
        (mean_repeated, "losses that depend on one sample each; .* every batched layer"),
        (contrastive, "losses that depend on one sample each; .* every batched layer"),
        (neighbours, "losses that depend on one sample each; .* every batched layer"),
        (history, "losses that depend on one sample each; .* every batched layer"),
        (two_halves, "losses that depend on one sample each; .* every batched layer"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("<>"),
)  # fmt: skip
def test_bad_losses_are_refused_and_the_model_is_untouched(loss_fn, text):
    case = models.mlp()
    model, _ = decorated(case)
    before = state_of(model)
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(model, [BATCH, BATCH], loss_fn=loss_fn)
    assert_same_state(before, state_of(model))


def as_rows(model, x):
    return model(x).square().mean(1)


@pytest.mark.parametrize(
    ("batch", "loss_fn", "text"),
    [
        pytest.param(
            (torch.randn(7, 1), torch.arange(7)), lambda m, b: as_rows(m, b[0]).mean()[None],
            "got 1 losses for a batch of 7", id="mean-with-one-feature",
        ),
        pytest.param(
            (torch.randn(8, 3), torch.randn(8, 1)), lambda m, b: as_rows(m, b[0]).mean()[None],
            "got 1 losses for a batch of 8", id="mean-with-labels-in-a-column",
        ),
    ],
)  # fmt: skip
def test_a_dim_of_one_tensor_does_not_make_the_batch_time_first(batch, loss_fn, text):
    with pytest.raises(ValueError, match=text):
        ff.estimate_fisher(nn.Linear(batch[0].shape[1], 2), [batch], loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("batch", "loss_fn"),
    [
        pytest.param(
            (torch.randn(7, 3), torch.tensor([0, 0, 1, 1, 1, 2, 2])),
            lambda m, b: torch.zeros(3).index_add(0, b[1], as_rows(m, b[0])), id="graphs",
        ),
        pytest.param(
            ([torch.randn(3, 3)] * 6, [0, 1] * 3),
            lambda m, b: torch.stack([m(image).square().sum() for image in b[0]]), id="detection",
        ),
        pytest.param(
            (torch.randn(7, 3), [7]), lambda m, b: m(b[0]).square().sum()[None], id="one-packed",
        ),
    ],
)  # fmt: skip
def test_batches_with_another_idea_of_a_sample_are_exact(batch, loss_fn):
    model = nn.Linear(3, 2)
    fisher = ff.estimate_fisher(model, [batch], loss_fn=loss_fn)
    expected = torch.zeros_like(model.weight)
    for loss in loss_fn(model, batch):
        expected += torch.autograd.grad(loss, model.weight, retain_graph=True)[0].square()
    torch.testing.assert_close(fisher["weight"], expected)


def test_a_bag_with_a_leading_dim_is_one_sample():
    model, bag = nn.Linear(3, 2), torch.randn(1, 5, 3)
    fisher = ff.estimate_fisher(model, [bag], loss_fn=lambda m, x: m(x).square().mean((1, 2)))
    assert fisher.num_samples == 1
    assert fisher["weight"].all()


def test_one_value_expanded_is_refused_where_nothing_is_batched():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(6))

    def loss_fn(model, batch):
        return (batch[0] * model.scale).square().mean().expand(4)

    with pytest.raises(ValueError, match="got one value expanded to 4"):
        ff.estimate_fisher(model, [BATCH], loss_fn=loss_fn)


class CheckpointFunction(torch.autograd.Function):
    """A reentrant checkpoint of another library: its inner graph comes to be in the backward."""

    @staticmethod
    def forward(ctx, layer, x):
        ctx.layer, ctx.x = layer, x.detach()
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            ctx.layer(x).backward(grad)
        return None, x.grad


@pytest.mark.parametrize("frozen", [False, True], ids=["trained-below", "frozen-below"])
def test_a_checkpoint_that_hides_its_layers_is_refused(frozen):
    def run(self, x):
        x = self.first(x)
        if frozen:
            x = x.clone().requires_grad_()
        return self.head(CheckpointFunction.apply(self.inner, x))

    layers = {name: nn.Linear(6, n) for name, n in (("first", 6), ("inner", 6), ("head", 4))}
    model = models.Calls(run, **layers)
    model.first.requires_grad_(not frozen)
    before = state_of(model)
    with pytest.raises(ValueError, match="checkpoints must not be reentrant.*of another library"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"batches": []}, ValueError, "batches must give at least one sample; got none"),
        ({"batches": {"x": BATCH[0]}}, TypeError, r"got one dict; pass \[batch\]"),
        ({"batches": BATCH[0]}, TypeError, r"got one Tensor; pass \[batch\]"),
        ({"batches": collections.UserDict()}, TypeError, "got one UserDict"),
        ({"batches": "digits"}, TypeError, "got one str"),
        ({"model": [nn.Linear(6, 4)]}, TypeError, "model must be a torch.nn.Module; got list"),
        ({"loss_fn": "mean"}, TypeError, r"must be a function loss_fn\(model, batch\); got str"),
        ({"batches": 3}, TypeError, "batches must be an iterable of batches; got one int"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1; got 0"),
        ({"num_samples": -5}, ValueError, "num_samples must be at least 1; got -5"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer; got 2.5"),
        ({"num_samples": True}, TypeError, "num_samples must be an integer; got True"),
        ({"power": 3}, ValueError, r"power must be 2 \(squares\) or 1 .*; got 3"),
        ({"power": "2"}, ValueError, r"power must be 2 \(squares\) or 1 .*; got '2'"),
        ({"fisher_type": "true"}, ValueError, "must be one of 'empirical', .*; got 'true'"),
        ({"loss_fn": None}, TypeError, r"mappings with 'labels'; got a tuple; pass loss_fn"),
        ({"loss_fn": None, "batches": [{"x": BATCH[0]}]}, TypeError, r"got a mapping with \['x'\]"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_and_the_model_is_untouched(arguments, error, text):
    model, _ = decorated(models.mlp())
    before = state_of(model)
    with pytest.raises(error, match=text):
        ff.estimate_fisher(**{"model": model, "batches": [BATCH], "loss_fn": classify, **arguments})
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Linear(6, 4).requires_grad_(False)],
    ids=["no-parameters", "frozen"],
)
def test_models_without_trainable_parameters_are_refused(model):
    with pytest.raises(ValueError, match="model must have parameters with requires_grad=True"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)


def test_complex_parameters_are_refused():
    model = nn.Linear(6, 4)
    model.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="must be real .*; got torch.complex64 for 'phase'"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.BatchNorm1d(6), "BatchNorm1d in train mode"),
        (nn.Dropout(0.1), "Dropout in train mode"),
        (nn.MultiheadAttention(6, 2, dropout=0.1), "MultiheadAttention in train mode"),
        (nn.LSTM(6, 6, 2, dropout=0.1), "LSTM in train mode"),
    ],
    ids=["batch-norm", "dropout", "attention", "lstm"],
)
def test_eval_mode_off_refuses_modules_that_mix_samples_or_add_noise(module, named):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(module), nn.Linear(6, 4))
    before = state_of(model)
    with pytest.raises(
        ValueError, match=f"eval_mode=False needs '1.0' in eval mode; got a {named}"
    ):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify, eval_mode=False)
    assert_same_state(before, state_of(model))


def test_batch_norm_without_running_statistics_is_refused():
    """It mixes samples in eval mode too."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="'1' must have running statistics; got a BatchNorm1d"):
        ff.estimate_fisher(model, [BATCH], loss_fn=classify)
