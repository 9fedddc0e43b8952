"""Samples of different lengths, packed: as many rows as before say nothing about whose they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishfast as ff


def by_split(h, lengths):
    return torch.stack([part.square().sum() for part in h.split(lengths)])


def by_slices(h, lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    pairs = zip(ends, lengths, strict=True)
    return torch.stack([h[end - length : end].square().sum() for end, length in pairs])


def by_index_add(h, lengths):
    samples = torch.repeat_interleave(torch.tensor(lengths))
    return h.new_zeros(len(lengths), h.shape[1]).index_add(0, samples, h).square().sum(1)


@pytest.mark.parametrize("pool", [by_split, by_slices, by_index_add])
def test_packed_samples(pool):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(torch.randn(6, 4), lengths) for lengths in ([3, 3], [2, 4], [1, 5], [3, 3], [4, 2])]

    def losses(model, batch):
        x, lengths = batch
        return pool(model(x), lengths)

    fisher = ff.estimate_fisher(model, batches, loss_fn=losses)
    assert not fisher.fallback
    exact = [torch.zeros_like(p) for p in model.parameters()]
    for batch in batches:
        for loss in losses(model, batch):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for total, grad in zip(exact, grads, strict=True):
                total += grad.square()
    for score, expected in zip(fisher.values(), exact, strict=True):
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-7)
