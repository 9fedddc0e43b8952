"""Rows of the sampled Fisher: their mean, their draws and the generator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from head_checks import every_class, every_label_vector, rows_of


def assert_mean_is(draws, expected):
    """The mean over independent draws, [n, ...], is within 5 of its own standard errors."""
    error = (draws.mean(0) - expected).abs()
    standard = draws.std(0) / len(draws) ** 0.5
    assert (error <= 5 * standard + 1e-9).all(), float((error / standard).max())


# What a row's gradient is: sum_c over classes of a fixed vector, as a layer below would make it.
DIRECTIONS = torch.randn(3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("head", ["softmax", "sigmoid", "gaussian"])
def test_sampled_is_unbiased(head, draws, power):
    outputs = torch.tensor([[0.5, -1.0, 1.5], [0.0, 2.0, -2.0]], dtype=torch.float64)
    many = 4000
    generator = torch.Generator().manual_seed(4)
    # Every copy of a sample in the batch has draws of its own.
    rows = rows_of(outputs.repeat(many, 1), head, "sampled", power, draws, generator)
    assert rows.shape == (draws, 2 * many, 3)
    grads = rows @ DIRECTIONS
    found = (grads.square() if power == 2 else grads.abs()).sum(0).view(many, 2, 3)
    assert_mean_is(found, expectation(head, outputs, power))


def expectation(head, outputs, power):
    """E_y f(J^T gradient by the outputs) over every y there is; [B, directions]."""
    total = torch.zeros(len(outputs), 3, dtype=torch.float64)
    for b, z in enumerate(outputs):
        if head == "gaussian":
            variance = DIRECTIONS.square().sum(0)
            total[b] = variance if power == 2 else (variance * 2 / math.pi).sqrt()
            continue
        z = z.clone().requires_grad_()
        for loss in (every_class if head == "softmax" else every_label_vector)(z):
            (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
            total[b] += loss.detach().neg().exp() * (grad @ DIRECTIONS).abs() ** power
    return total


@pytest.mark.parametrize("power", [2, 1])
def test_sampled_tokens_are_unbiased_over_sequences(power):
    """Every sequence of the counted positions, weighed by its probability."""
    torch.manual_seed(6)
    outputs = torch.randn(2, 3, 3, dtype=torch.float64)
    counted = torch.tensor([[True, False, True], [False, True, False]])
    directions = torch.randn(9, 4, dtype=torch.float64)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        z = outputs[b].clone().requires_grad_()
        places = counted[b].nonzero()[:, 0]
        for tokens in itertools.product(range(3), repeat=len(places)):
            losses = F.cross_entropy(z[places], torch.tensor(tokens), reduction="none")
            (grad,) = torch.autograd.grad(losses.mean(), z, retain_graph=True)
            share = losses.detach().sum().neg().exp()
            expected[b] += share * (grad.flatten() @ directions).abs() ** power
    many = 3000
    rows = rows_of(
        outputs.repeat(many, 1, 1), "tokens", "sampled", power, 2,
        torch.Generator().manual_seed(1), counted.repeat(many, 1),
    )  # fmt: skip
    assert rows.view(2, many, 2, 3, 3)[..., ~counted, :].count_nonzero() == 0
    grads = rows.flatten(2) @ directions
    found = (grads.square() if power == 2 else grads.abs()).sum(0).view(many, 2, 4)
    assert_mean_is(found, expected)


@pytest.mark.parametrize("head", ["softmax", "tokens"])
def test_a_drawn_row_is_the_gradient_of_the_drawn_label(head):
    """It is p - onehot to the last digit, whichever label that is."""
    outputs = (10 * torch.randn(50, 7)).double()
    given = outputs.unsqueeze(1) if head == "tokens" else outputs
    (found,) = rows_of(given, head, "sampled", 2, generator=torch.Generator().manual_seed(0))
    found = found.view(50, 7)
    drawn = found.argmin(1)
    assert len(drawn.unique()) > 3
    z = outputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(z, drawn, reduction="sum"), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_classes_of_probability_zero_are_never_drawn():
    outputs = torch.full((1000, 9), -1e4)
    outputs[:, 2] = outputs[:, 5] = 0.0
    (found,) = rows_of(outputs, "softmax", "sampled", 2, 1, torch.Generator().manual_seed(0))
    assert sorted(found.argmin(1).unique().tolist()) == [2, 5]


def test_draws_are_the_same_however_many_rows_are_held(monkeypatch):
    outputs, counted = torch.randn(4, 6, 11), torch.rand(4, 6) < 0.7

    def rows():
        generator = torch.Generator().manual_seed(0)
        return rows_of(outputs, "tokens", "sampled", 2, 2, generator, counted)

    expected = rows()
    monkeypatch.setattr("fishfast.fisher.heads._CHUNK", 30)
    assert torch.equal(rows(), expected)


@pytest.mark.parametrize("head", ["softmax", "sigmoid", "gaussian", "tokens"])
def test_draws_repeat_with_a_seed_and_leave_the_global_state_alone(head):
    outputs = torch.randn(4, 5, 6) if head == "tokens" else torch.randn(4, 5)
    before = torch.get_rng_state()

    def rows(seed):
        return rows_of(outputs, head, "sampled", 2, 3, torch.Generator().manual_seed(seed))

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))
    assert torch.equal(torch.get_rng_state(), before)
    # A generator's state goes on from draw to draw, so that a saved one resumes.
    generator, whole = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    parts = [rows_of(outputs, head, "sampled", 2, 1, generator) for _ in range(4)]
    joined = rows_of(outputs, head, "sampled", 2, 4, whole)
    torch.testing.assert_close(torch.cat(parts) / 2, joined)
    assert torch.equal(generator.get_state(), whole.get_state())


def test_a_sample_of_no_counted_position_scores_nothing():
    counted = torch.tensor([[False, False], [True, False]])
    (found,) = rows_of(
        torch.randn(2, 2, 5), "tokens", "sampled", 2, 1, torch.Generator(), counted
    )  # fmt: skip
    assert found[0].count_nonzero() == found[1, 1].count_nonzero() == 0
    assert found[1, 0].count_nonzero() == 5


def test_exact_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    rows_of(torch.randn(3, 4), "softmax", "exact", 2, 1, generator)
    assert torch.equal(generator.get_state(), before)
