"""Batches of which few samples count, one, or none."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, assert_same_state, score, state_of, truth
from torch import nn

import fishfast as ff

GENERATOR = torch.Generator().manual_seed(5)


def batch_of(*labels):
    x = torch.randn(len(labels), 6, generator=GENERATOR)
    return x, torch.tensor(labels, dtype=torch.long)


def labelled_only(model, batch):
    """The losses of the samples that have a label."""
    x, y = batch
    return F.cross_entropy(model(x)[y >= 0], y[y >= 0], reduction="none")


def labelled_inputs_only(model, batch):
    """The same, of a forward of these samples alone."""
    x, y = batch
    return F.cross_entropy(model(x[y >= 0]), y[y >= 0], reduction="none")


def take_labelled(batch, index):
    x, y = batch
    kept = (y >= 0).nonzero().flatten()[index : index + 1]
    return (x[kept], y[kept]) if len(kept) else None


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


class Flat(nn.Module):
    """Runs on flattened steps."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x.reshape(3 * len(x), 2)))
        return self.out(hidden.view(len(x), 3, 4).sum(1))


class Prototypes(nn.Module):
    """No call of it has a rule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return torch.einsum("bd,kd->bk", x, self.weight)


ALL, TWO, ONE, OTHER, NONE, EMPTY = (
    (0, 1, 2, 0), (0, -1, 2, -1), (-1, 1, -1, -1), (-1, -1, -1, 2), (-1, -1, -1, -1), ()
)  # fmt: skip


@pytest.mark.parametrize("loss_fn", [labelled_only, labelled_inputs_only], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [net, Flat], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "labels",
    [
        [ALL, TWO, ONE], [ONE], [ONE, OTHER, ALL], [NONE, ALL], [ALL, NONE, TWO], [ALL, EMPTY],
        [EMPTY, ONE, NONE, ALL], [TWO, TWO], [(-1, 2), (1, -1), (0, 1)],
    ],
    ids=lambda batches: "-".join(str(sum(label >= 0 for label in one)) for one in batches),
)  # fmt: skip
def test_what_counts_is_scored(labels, make, loss_fn):
    case = models.Case(
        make(), [batch_of(*one) for one in labels], loss_fn, set(), take=take_labelled
    )
    before = state_of(case.model)
    fisher = score(case)
    assert fisher.num_samples == sum(label >= 0 for one in labels for label in one)
    assert fisher.num_batches == len(labels)
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))
    assert_same_state(before, state_of(case.model))


def test_a_batch_without_rows_is_not_run():
    calls = []
    model = net()
    model.register_forward_hook(lambda *_: calls.append(1))
    fisher = ff.estimate_fisher(model, [batch_of(), batch_of(0, 1)], loss_fn=labelled_only)
    assert fisher.num_samples == 2
    assert len(calls) == fisher.passes["forward"]


@pytest.mark.parametrize("fisher_type", ["exact", "sampled"])
def test_outputs_of_no_sample(fisher_type):
    def outputs_fn(model, batch):
        return model(batch[0][batch[1] >= 0])

    full, none = batch_of(0, 1, 2), batch_of(-1, -1)
    model = net()
    options = {"fisher_type": fisher_type, "outputs_fn": outputs_fn}
    fisher = ff.estimate_fisher(model, [none, full, none], **options)
    expected = ff.estimate_fisher(model, [full], **options)
    assert fisher.num_samples == 3
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)


def test_default_losses_without_any_label():
    """One loss for each sample, all of which are zero."""

    class Head(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    x = torch.randn(4, 6, generator=GENERATOR)
    none, some = torch.full((4,), -100), torch.tensor([0, -100, 1, 2])
    model = Head(6, 3)
    batches = [{"x": x, "labels": labels} for labels in (none, some, none)]
    fisher = ff.estimate_fisher(model, batches)
    expected = ff.estimate_fisher(model, batches[1:2])
    assert fisher.num_samples == 12
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)


@pytest.mark.parametrize("labels", [[NONE], [NONE, EMPTY], [EMPTY]])
def test_no_sample_at_all_is_refused(labels):
    with pytest.raises(ValueError, match="batches must give at least one sample; got none"):
        ff.estimate_fisher(net(), [batch_of(*one) for one in labels], loss_fn=labelled_only)


def a_mean(model, batch):
    return labelled_only(model, batch).mean()[None]


class Pooled(nn.Module):
    """As many steps as samples, the last of which alone has a gradient."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x.unsqueeze(1).expand(-1, 4, -1).clone())[:, -1]


class Positions(nn.Module):
    """The only trained table is looked up once for the whole batch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1, 6)
        self.register_buffer("head", torch.randn(6, 3))

    def forward(self, x):
        return torch.tanh(x + self.table(torch.arange(1)[None])[0]) @ self.head


@pytest.mark.parametrize(
    ("make", "loss_fn", "batch"),
    [
        (net, a_mean, batch_of(0, 1, 2, 0)),
        (Flat, a_mean, batch_of(0, 1, 2, 0)),
        (Pooled, a_mean, batch_of(0, 1, 2, 0)),
        (Positions, a_mean, batch_of(0, 1, 2, 0)),
        (Prototypes, labelled_only, batch_of(*ONE)),
    ],
    ids=["mean", "flattened", "last-steps", "positions", "no-rows-to-look-at"],
)
def test_one_loss_that_may_be_a_mean_is_refused(make, loss_fn, batch):
    with pytest.raises(ValueError, match="got 1 losses for a batch of 4 .their mean"):
        ff.estimate_fisher(make(), [batch], loss_fn=loss_fn)


def test_one_loss_of_a_loss_fn_that_gave_several():
    """Then it is no mean, though there are no rows to look at."""
    case = models.Case(
        Prototypes(), [batch_of(*ALL), batch_of(*ONE)], labelled_only, set(), take=take_labelled
    )
    assert_as_exact_as_a_loop(score(case), truth(case), truth(case, torch.float32))
