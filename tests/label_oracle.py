"""The Fisher over a model's own labels, in float64: one backward for every label there is."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from head_checks import every_class, every_label_vector
from models import only
from oracle import in_dtype


def moments(model, batches, outputs_fn, labels, power=2, dtype=torch.float64):
    """Sum over samples of E_y |gradient of -log p(y)|**power, each sample in a forward of its own.

    Args:
        model: scored in eval mode.
        batches: their tensors have the samples on dim 0.
        outputs_fn: ``outputs_fn(model, batch)`` for a batch of one.
        labels: ``labels(outputs[0], power)`` returns (probability, -log p) of every label.
        power: 2 or 1.
        dtype: float64 for the truth; float32 for what plain torch makes of it.

    Returns:
        Name -> float64 array; and the variance of a sum in which each sample has one draw.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    mean = {name: np.zeros(tuple(model.get_parameter(name).shape)) for name in names}
    variance = copy.deepcopy(mean)
    for single in samples_of(batches):
        (outputs,) = outputs_fn(model, in_dtype(single, dtype))
        weighed = list(labels(outputs, power))
        own = {name: [] for name in names}
        for _, loss in weighed:
            weights = [model.get_parameter(name) for name in names]
            grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for name, grad, weight in zip(names, grads, weights, strict=True):
                grad = torch.zeros_like(weight) if grad is None else grad
                own[name].append(np.abs(grad.double().numpy()) ** power)
        probabilities = [float(p) for p, _ in weighed]
        assert math.isclose(sum(probabilities), 1, rel_tol=1e-5)
        for name in names:
            first = np.tensordot(probabilities, own[name], 1)
            mean[name] += first
            variance[name] += np.tensordot(probabilities, (own[name] - first) ** 2, 1)
    return mean, variance


def samples_of(batches):
    for batch in batches:
        taken = (only(batch, b) for b in itertools.count())
        yield from itertools.takewhile(lambda single: single is not None, taken)


def classes(outputs, power=2):
    """Every class of softmax outputs [C]."""
    return [(loss.detach().neg().exp(), loss) for loss in every_class(outputs)]


def label_vectors(outputs, power=2):
    """Every vector of yes and no, of sigmoid outputs [L]."""
    losses = every_label_vector(outputs.reshape(-1).double())
    return [(loss.detach().neg().exp(), loss) for loss in losses]


def sigma_points(outputs, power=2):
    """Labels on both sides of every mean, as many as have the normal's moments.

    Squares of sums need its second moments only; absolute values of one output its mean distance.
    """
    outputs = outputs.reshape(-1)
    distance = 1.0 if power == 2 else math.sqrt(2 / math.pi)
    signs = itertools.product([-distance, distance], repeat=len(outputs))
    labels = [outputs.detach() + torch.tensor(s, dtype=outputs.dtype) for s in signs]
    return [(1 / len(labels), (outputs - y).square().sum() / 2) for y in labels]


def sequences(logits, power=2):
    """Every sequence of tokens for logits [positions, V]; the loss is the mean over positions."""
    found = []
    for tokens in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        losses = F.cross_entropy(logits, torch.tensor(tokens), reduction="none")
        found.append((losses.detach().sum().neg().exp(), losses.mean()))
    return found
