"""A small mask and what it is made of."""

from __future__ import annotations

import torch

import fishfast as ff

INDICES = {
    "a.weight": torch.tensor([0, 2, 5], dtype=torch.int32),
    "a.bias": torch.tensor([], dtype=torch.int32),
    "scale": torch.tensor([0], dtype=torch.int32),
}
SHAPES = {"a.weight": (2, 3), "a.bias": (3,), "scale": ()}
FINGERPRINT = "8888224a604cf352c4a2fdbdfe49883b57eca4b8d4ddbca569693e69ac60e35e"


def small_mask(num_zero_score=None):
    """Return the mask of these indices and shapes."""
    return ff.SparseMask(INDICES, SHAPES, num_zero_score)
