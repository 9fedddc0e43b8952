"""Every label there is, and what rows make of outputs: for the tests of `fishfast.fisher.heads`."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from fishfast.fisher.heads import output_rows


def every_class(outputs):
    return [F.cross_entropy(outputs, torch.tensor(c)) for c in range(len(outputs))]


def every_label_vector(outputs):
    return [
        F.binary_cross_entropy_with_logits(outputs, torch.tensor(y).double(), reduction="sum")
        for y in itertools.product([0.0, 1.0], repeat=len(outputs))
    ]


def rows_of(outputs, *arguments, **options):
    """The rows' coefficients: how each depends on the outputs, [rows, B, ...]."""
    outputs = outputs.clone().requires_grad_()
    rows = list(output_rows(outputs, *arguments, **options))
    if not rows:
        return outputs.new_zeros(0, *outputs.shape).detach()
    return torch.stack([torch.autograd.grad(row.sum(), outputs, retain_graph=True)[0]
                        for row in rows])  # fmt: skip
