"""Ground truth in float64 and plain loops: shares no code with what it judges."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import numpy as np
import torch

# ---- scores and masks ---------------------------------------------------------------------------


def fisher_by_loop(model, batches, loss_fn, take, *, power=2, dtype=torch.float64, limit=None):
    """Per-sample Fisher, one sample per forward, on a copy of the model in ``dtype``.

    Args:
        model: scored in eval mode.
        batches: list of batches.
        loss_fn: ``loss_fn(model, batch) -> [B]``.
        take: ``take(batch, b)`` gives the batch that holds sample b alone, or None past the end.
        power: 2 or 1.
        dtype: float64 for the truth; float32 or bfloat16 for what plain torch makes of it.
        limit: stop after this many samples.

    Returns:
        Name -> float64 array of the parameter's shape.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for p in model.parameters() if p.requires_grad]
    total = {name: np.zeros(tuple(p.shape)) for name, p in zip(names, weights, strict=True)}
    done = 0
    for batch in batches:
        for b in itertools.count():
            one = take(batch, b)
            if one is None or done == limit:
                break
            with torch.enable_grad():
                (loss,) = loss_fn(model, in_dtype(one, dtype))
                grads = torch.autograd.grad(loss, weights, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    total[name] += np.abs(grad.to_dense().double().numpy()) ** power
            done += 1
    return total


def fisher_by_backwards(model, batches, loss_fn, power=2):
    """Per-sample Fisher as plain torch makes it of whole batches: one backward per sample.

    The reference where precision is low: a forward of one sample rounds differently from one of a
    batch (bf16 products, a ReLU that flips), whoever takes the gradients.
    """
    model = copy.deepcopy(model).eval()
    total = {name: np.zeros(tuple(p.shape)) for name, p in model.named_parameters()}
    for batch in batches:
        for loss in loss_fn(model, batch):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += np.abs(grad.double().numpy()) ** power
    return total


def in_dtype(batch, dtype):
    """Cast the floating tensors of a batch (a tensor, or nested lists, tuples and dicts)."""
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: in_dtype(value, dtype) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(in_dtype(value, dtype) for value in batch)
    return batch


def top_k(scores, k):
    """The k largest of all scores: numpy's stable sort of one long float64 vector.

    Args:
        scores: name -> tensor >= 0.
        k: how many.

    Returns:
        Name -> ascending indices, for every name.
    """
    flat = {name: score.double().numpy().reshape(-1) for name, score in scores.items()}
    order = np.argsort(-np.concatenate(list(flat.values())), kind="stable")
    chosen = np.sort(order[:k])
    found, start = {}, 0
    for name, values in flat.items():
        own = chosen[(chosen >= start) & (chosen < start + len(values))]
        found[name] = own - start
        start += len(values)
    return found


# --- optimizers: one weight at a time, a list of its gradients in, its trajectory out ---


def adamw_trajectory(
    weight: float,
    gradients: list[float],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = True,
) -> list[tuple[float, ...]]:
    """Return (weight, first moment, second moment) after each step of AdamW or Adam.

    With amsgrad the largest second moment is the fourth number.
    """
    first = second = largest = 0.0
    trajectory: list[tuple[float, ...]] = []
    for step, gradient in enumerate(gradients, start=1):
        gradient = -gradient if maximize else gradient
        if not decoupled_weight_decay:
            gradient += weight_decay * weight
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        largest = max(largest, second)
        unbiased_first = first / (1 - betas[0] ** step)
        unbiased_second = (largest if amsgrad else second) / (1 - betas[1] ** step)
        if decoupled_weight_decay:
            weight -= lr * weight_decay * weight
        weight -= lr * unbiased_first / (unbiased_second**0.5 + eps)
        trajectory.append((weight, first, second, *((largest,) if amsgrad else ())))
    return trajectory


def sgd_trajectory(
    weight: float,
    gradients: list[float],
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> list[tuple[float, float]]:
    """Return (weight, momentum buffer) after each step of SGD."""
    buffer = 0.0
    trajectory = []
    for step, gradient in enumerate(gradients, start=1):
        gradient = -gradient if maximize else gradient
        gradient += weight_decay * weight
        buffer = gradient if step == 1 else momentum * buffer + (1 - dampening) * gradient
        direction = gradient if momentum == 0 else buffer
        if nesterov:
            direction = gradient + momentum * buffer
        weight -= lr * direction
        trajectory.append((weight, buffer))
    return trajectory
