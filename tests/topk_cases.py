"""Backends, and the small model, that the tests of `top_k_mask` go through."""

from __future__ import annotations

import torch

# "simulated": the CUDA kernels and the Python above them, on CPU tensors.
BACKENDS = ["cpu", "torch", "simulated"]

NAMES = ["fc.weight", "fc.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc", "head"]


def model_scores():
    """Return scores that grow from parameter to parameter: 1, 1, 1, 1, 2, ..."""
    return {name: torch.full((4,), float(i + 1)) for i, name in enumerate(NAMES)}


def few_values(*shape):
    """Return scores with many ties."""
    return torch.randint(0, 7, shape).float()
