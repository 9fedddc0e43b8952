"""Rows of the exact Fisher, against loops over every label in float64; what heads refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from head_checks import every_class, every_label_vector, rows_of
from torch import nn

from fishfast.fisher.heads import output_rows

INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def net(outputs):
    """A small model, so that a sample's gradient is no mere outer product."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def gradient(model, value):
    """One vector of every parameter's gradient."""
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([grad.reshape(-1) for grad in grads])


def by_rows(model, *arguments):
    """Sum over rows and samples of f(gradient), a batch-1 forward for every sample."""
    total = 0
    for x in INPUTS:
        for row in output_rows(model(x[None]), *arguments):
            assert row.shape == (1,)
            grad = gradient(model, row[0])
            total = total + (grad.square() if arguments[2] == 2 else grad.abs())
    return total


def by_labels(model, labels_and_losses, power):
    """Sum over samples of E_y f(gradient of -log p(y)), one backward for each y.

    Args:
        model: what is scored.
        labels_and_losses: outputs of one sample -> losses -log p(y), one for each y there is.
        power: 2 or 1.
    """
    total = 0
    for x in INPUTS:
        for loss in labels_and_losses(model(x[None])[0]):
            grad = gradient(model, loss)
            total = total + loss.detach().neg().exp() * (
                grad.square() if power == 2 else grad.abs()
            )
    return total


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_exact_softmax_is_the_expectation_over_classes(classes, power):
    model = net(classes)
    torch.testing.assert_close(
        by_rows(model, "softmax", "exact", power), by_labels(model, every_class, power)
    )


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_exact_sigmoid_is_the_expectation_over_label_vectors(labels):
    model = net(labels)
    torch.testing.assert_close(
        by_rows(model, "sigmoid", "exact", 2), by_labels(model, every_label_vector, 2)
    )


def test_exact_absolute_sigmoid_of_one_label():
    model = net(1)
    torch.testing.assert_close(
        by_rows(model, "sigmoid", "exact", 1), by_labels(model, every_label_vector, 1)
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_exact_gaussian_is_the_sum_over_outputs(outputs):
    """E (sum_l eps_l g_l)^2 = sum_l g_l^2 for independent eps_l of variance 1."""
    model = net(outputs)
    expected = sum(gradient(model, mu).square() for x in INPUTS for mu in model(x))
    torch.testing.assert_close(by_rows(model, "gaussian", "exact", 2), expected)


def test_exact_absolute_gaussian_of_one_output():
    """E |eps g| = |g| E |eps|, by the trapezium rule over the density."""
    eps = np.linspace(-12, 12, 200_001)
    mean_abs = np.trapezoid(np.abs(eps) * np.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi), eps)
    model = net(1)
    expected = mean_abs * sum(gradient(model, model(x)[0]).abs() for x in INPUTS)
    torch.testing.assert_close(by_rows(model, "gaussian", "exact", 1), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", ["sigmoid", "gaussian"])
@pytest.mark.parametrize("fisher_type", ["exact", "sampled"])
def test_one_output_needs_no_second_dimension(head, fisher_type):
    def of(shape):
        return rows_of(
            torch.linspace(-3, 3, 5).view(shape), head, fisher_type, 2,
            generator=torch.Generator().manual_seed(0),
        ).flatten()  # fmt: skip

    assert torch.equal(of((5,)), of((5, 1)))


@pytest.mark.parametrize(
    ("head", "shape", "power", "rows"),
    [
        ("softmax", (3, 2), 2, 1), ("softmax", (3, 2), 1, 1), ("softmax", (3, 9), 2, 8),
        ("softmax", (3, 9), 1, 9), ("sigmoid", (3, 4), 2, 4), ("sigmoid", (3, 1), 1, 1),
        ("gaussian", (3, 4), 2, 4), ("gaussian", (3,), 1, 1), ("softmax", (0, 3), 2, 2),
    ],
)  # fmt: skip
def test_number_of_exact_rows(head, shape, power, rows):
    found = rows_of(torch.randn(shape), head, "exact", power)
    assert found.shape == (rows, *shape)


# Logits whose probabilities have underflowed, are one-hot, or go down by 80 orders of magnitude.
LOGITS = {
    "random": torch.randn(4, 6, generator=torch.Generator().manual_seed(2)),
    "uniform": torch.zeros(2, 5),
    "one-hot-first": torch.tensor([[0.0, -1e4, -1e4, -1e4]]),
    "one-hot-middle": torch.tensor([[-1e4, -1e4, 0.0, -1e4, -1e4]]),
    "one-hot-last": torch.tensor([[-1e4, -1e4, -1e4, 0.0]]),
    "two-left": torch.tensor([[-1e4, 0.0, -1e4, 1.0, -1e4]]),
    "descending": torch.arange(0.0, -200, -20).unsqueeze(0),
    "ascending": torch.arange(-180.0, 1, 20).unsqueeze(0),
    "two-classes": torch.tensor([[0.0, 40.0], [40.0, 0.0], [0.0, 1e30], [1.0, 1.0]]),
    "thousand": 3 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(2)),
}


def covariance(logits):
    """diag(p) - p p^T; p (1 - p) with 1 - p as the sum of the others, which loses no digits."""
    p = logits.double().softmax(1)
    others = 1 - torch.eye(p.shape[1], dtype=torch.float64)
    return torch.diag_embed(p * (p @ others)) - p[:, :, None] * p[:, None, :] * others


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_factor_of_the_softmax_covariance(name, dtype, rtol):
    logits = LOGITS[name]
    s = rows_of(logits.to(dtype), "softmax", "exact", 2).double().permute(1, 2, 0)  # [B, C, C - 1]
    assert s.shape[2] == logits.shape[1] - 1
    expected = covariance(logits)
    # Relative to each entry's own scale sqrt(c_ii c_jj), not to the largest of the matrix; fp32
    # knows no probability below 1e-38.
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()
    allowed = rtol * scale[:, :, None] * scale[:, None, :] + (
        1e-35 if dtype == torch.float32 else 1e-300
    )
    assert ((s @ s.mT - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", LOGITS)
def test_absolute_rows_of_degenerate_probabilities(name):
    logits = LOGITS[name]
    found = rows_of(logits, "softmax", "exact", 1).double().abs().sum(0)
    # sum_c p_c |p - e_c|: 2 p_i (1 - p_i) at i.
    expected = 2 * torch.diagonal(covariance(logits), dim1=1, dim2=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("value", [40.0, -40.0, 90.0, -90.0])
def test_sigmoid_far_out_keeps_its_digits(value):
    (found,) = rows_of(torch.tensor([[value]]), "sigmoid", "exact", 2).flatten()
    assert float(found) == pytest.approx(math.exp(-abs(value) / 2), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_low_precision_outputs_get_coefficients_of_fp32(head, dtype):
    outputs = torch.randn(8, 5).to(dtype)
    found = rows_of(outputs, head, "exact", 2)
    assert found.dtype == dtype
    assert torch.equal(found, rows_of(outputs.float(), head, "exact", 2).to(dtype))


def test_rows_are_made_one_at_a_time():
    outputs = torch.randn(2, 1000, requires_grad=True)
    seen = [row for row, _ in zip(output_rows(outputs, "softmax", "exact", 2), range(3))]  # noqa: B905
    assert len(seen) == 3
    assert all(row.requires_grad and row.dtype == torch.float32 for row in seen)


# ---- refusals -----------------------------------------------------------------------------------

PAIRS, TOKENS = torch.randn(3, 2), torch.randn(3, 4, 5)
NAN = torch.tensor([[0.0, 1.0], [0.0, math.nan]])


@pytest.mark.parametrize(
    ("outputs", "head", "options", "text"),
    [
        (PAIRS, "logits", {}, "head must be one of 'softmax', .*'tokens'; got 'logits'"),
        (PAIRS, "softmax", {"fisher_type": "empirical"},
         "fisher_type must be 'exact' or 'sampled' to score outputs; got 'empirical'"),
        (TOKENS, "softmax", {}, r"shape \[B, C\], C >= 2, .* got \(3, 4, 5\); 'tokens' is for"),
        (PAIRS[:, :1], "softmax", {}, r"got \(3, 1\); .*'sigmoid' for one yes or no"),
        (PAIRS, "tokens", {"fisher_type": "sampled"}, r"shape \[B, T, V\] .*; got \(3, 2\)"),
        (TOKENS, "gaussian", {}, r"shape \[B\] or \[B, L\] .* got \(3, 4, 5\); flatten\(1\)"),
        (PAIRS[:, :0], "sigmoid", {}, r"outputs must not be empty; got shape \(3, 0\)"),
        (PAIRS.long(), "softmax", {}, "real floating-point tensor; got torch.int64"),
        ([1.0], "softmax", {}, "real floating-point tensor; got a list"),
        (NAN, "softmax", {}, "must be finite; got NaN or infinity for sample 1; leave classes"),
        (NAN[:, 1], "sigmoid", {}, "must be finite; got NaN or infinity for sample 1"),
        (PAIRS, "softmax", {"fisher_type": "sampled", "num_label_samples": 0},
         "num_label_samples must be at least 1; got 0"),
        (PAIRS, "softmax", {"counted": torch.ones(3, 2).bool()}, "counted goes with head='tokens'"),
        (TOKENS, "tokens", {"fisher_type": "sampled", "counted": torch.ones(3, 4)},
         r"bool tensor of shape \(3, 4\), .* got torch.float32 a tensor of shape \(3, 4\)"),
        (TOKENS, "tokens", {"fisher_type": "sampled", "counted": torch.ones(3, 5).bool()},
         r"bool tensor of shape \(3, 4\), .* got torch.bool a tensor of shape \(3, 5\)"),
        (TOKENS, "tokens", {}, r"V\*\*T label sequences for head='tokens'; use 'sampled'"),
        (PAIRS, "sigmoid", {"power": 1}, r"each of 2\*\*2 label vectors .* use power=2, or 'sampl"),
        (PAIRS, "gaussian", {"power": 1}, "infinitely many labels for head='gaussian' with 2 outp"),
    ],
)  # fmt: skip
def test_refusals(outputs, head, options, text):
    options = {"fisher_type": "exact", "power": 2, "generator": torch.Generator(), **options}
    with pytest.raises(ValueError, match=text):
        output_rows(outputs, head, **options)  # before the first row is asked for


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_label_samples": 2.0}, "num_label_samples must be an integer; got 2.0"),
        ({"num_label_samples": True}, "num_label_samples must be an integer; got True"),
        ({"generator": None}, "generator must be a torch.Generator .* got NoneType"),
    ],
)
def test_wrong_types_are_refused(options, text):
    options = {"num_label_samples": 1, "generator": torch.Generator(), **options}
    with pytest.raises(TypeError, match=text):
        output_rows(PAIRS, "softmax", "sampled", 2, **options)
