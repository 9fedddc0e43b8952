"""Samples of different lengths, packed: as many rows as before say nothing about whose they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fishfast as ff
from fishfast.fisher.engine.rows import Layout


def by_split(h, lengths):
    return torch.stack([part.square().sum() for part in h.split(lengths)])


def by_slices(h, lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    pairs = zip(ends, lengths, strict=True)
    return torch.stack([h[end - length : end].square().sum() for end, length in pairs])


def by_index_add(h, lengths):
    samples = torch.repeat_interleave(torch.tensor(lengths))
    return h.new_zeros(len(lengths), h.shape[1]).index_add(0, samples, h).square().sum(1)


def owners(lengths):
    """Return [B, N]: which rows are whose."""
    samples = torch.repeat_interleave(torch.tensor(lengths))
    return samples == torch.arange(len(lengths)).unsqueeze(1)


def by_matrix(h, lengths):
    return (owners(lengths).float() @ h).square().sum(1)


def by_mask(h, lengths):
    return (owners(lengths).unsqueeze(2) * h).sum(1).square().sum(1)


def by_where(h, lengths):
    return torch.where(owners(lengths).unsqueeze(2), h, 0).square().sum((1, 2))


def by_sparse_matrix(h, lengths):
    return torch.sparse.mm(owners(lengths).float().to_sparse(), h).square().sum(1)


def by_attention(h, lengths):
    scores = h[:, 0].masked_fill(~owners(lengths), -torch.inf)
    return (scores.softmax(1) @ h).square().sum(1)


def by_attention_in_blocks(h, lengths):
    mask = owners(lengths).float().T @ owners(lengths).float()
    h = F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=mask[None] > 0)[0]
    return by_matrix(h, lengths)


def by_slices_of_another_dim(h, lengths):
    parts = h.T.split(lengths, dim=1)
    return torch.stack([part.square().sum() for part in parts])


@pytest.mark.parametrize("first", [[3, 3], [2, 4]], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "pool",
    [
        by_split, by_slices, by_index_add, by_matrix, by_mask, by_where, by_sparse_matrix,
        by_attention, by_attention_in_blocks, by_slices_of_another_dim,
    ],
)  # fmt: skip
def test_packed_samples(pool, first):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    lengths = (first, [3, 3], [2, 4], [1, 5], [3, 3], [4, 2])
    batches = [(torch.randn(6, 4), of_batch) for of_batch in lengths]

    def losses(model, batch):
        x, lengths = batch
        return pool(model(x), lengths)

    fisher = ff.estimate_fisher(model, batches, loss_fn=losses)
    assert not fisher.fallback
    assert_like_a_loop(fisher, model, batches, losses)


def assert_like_a_loop(fisher, model, batches, losses):
    exact = [torch.zeros_like(p) for p in model.parameters()]
    for batch in batches:
        for loss in losses(model, batch):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for total, grad in zip(exact, grads, strict=True):
                total += grad.square()
    for score, expected in zip(fisher.values(), exact, strict=True):
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-7)


class Moved(nn.Module):
    """A shared layer over samples in dim 1, which a batch puts in another order."""

    def __init__(self, move):
        super().__init__()
        self.move, self.first, self.second = move, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, order):
        hidden = self.move(torch.tanh(self.first(x.transpose(0, 1))), order)
        return self.second(hidden).square().sum((0, 2))


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda h, order: h[:, order], id="index"),
        pytest.param(lambda h, order: h.roll(int(order[0]), 1), id="roll"),
        pytest.param(lambda h, order: torch.cat([h[:, order[0] :], h[:, : order[0]]], 1), id="cut"),
    ],
)
def test_samples_that_change_places(move):
    model = Moved(move)
    orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    batches = [(torch.randn(3, 5, 4), torch.tensor(order)) for order in orders]

    def losses(model, batch):
        return model(*batch)

    fisher = ff.estimate_fisher(model, batches, loss_fn=losses)
    assert_like_a_loop(fisher, model, batches, losses)


def by_a_product(h, order):
    """A permutation by a matrix product, which looks like any layer."""
    return torch.einsum("tbd,bc->tcd", h, torch.eye(3, dtype=h.dtype)[order].T)


def test_samples_that_a_product_moves():
    batches = [(torch.randn(3, 5, 4), torch.tensor(order)) for order in ([0, 1, 2], [1, 2, 0])]

    def losses(model, batch):
        return model(*batch)

    model = Moved(by_a_product)
    assert_like_a_loop(ff.estimate_fisher(model, batches, loss_fn=losses), model, batches, losses)


def test_samples_that_change_places_unseen_are_noticed_later(monkeypatch):
    """Whatever the graph says, every so often nothing is trusted."""
    monkeypatch.setattr(Layout, "step", lambda *_: None)  # which is what a product says
    batches = [(torch.randn(3, 5, 4), torch.arange(3)) for _ in range(4)]
    batches += [(torch.randn(3, 5, 4), torch.tensor([1, 2, 0]))]
    with pytest.raises(ValueError, match="'first.weight' changed"):
        ff.estimate_fisher(Moved(by_a_product), batches, loss_fn=lambda model, batch: model(*batch))


@pytest.mark.parametrize("samples", [0, 1], ids=["batch-first", "time-first"])
def test_flattened_rows_are_searched_for_their_samples_once(samples):
    """Flattened before a layer and back behind it, as GPT-2 does: no data says whose a row is."""

    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 2)

        def forward(self, x):
            x = x.transpose(0, samples)
            hidden = torch.addmm(torch.zeros(6), x.reshape(-1, 4), self.weight)
            hidden = torch.tanh(hidden.view(-1, 3, 2)).flatten(1) * 2  # as heads: 3, like samples
            return self.head(hidden.view(*x.shape[:2], 6)).square().sum((1 - samples, 2))

    batches = [torch.randn(3, length, 4) for length in (5, 5, 7, 2)]
    fisher = ff.estimate_fisher(Flattens(), batches, loss_fn=lambda model, x: model(x))
    assert fisher.passes["probe"] == 2
