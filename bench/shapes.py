"""Shapes that several benchmarks share: whole models, and the layers of models by name.

The whole models are arguments of `fisher_models.build`. A layer is what one kernel sees: a matrix
as (outputs, inputs), a convolution as (channels, pixels, kernel, stride).
"""

from __future__ import annotations

from typing import Any

import torch
from harness import full_size

__all__ = [
    "BERT_LARGE", "CONV_LAYERS", "LINEAR_LAYERS", "LLAMA_1B", "RESNET_50", "size_set",
]  # fmt: skip

BERT_LARGE: dict[str, Any] = {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 30522}
# TinyLlama, 1.1 B parameters.
LLAMA_1B: dict[str, Any] = {
    "layers": 22, "hidden": 2048, "heads": 32, "intermediate": 5632, "vocab": 32000,
}  # fmt: skip
RESNET_50: dict[str, Any] = {
    "layer": "bottleneck", "depths": [3, 4, 6, 3], "widths": [256, 512, 1024, 2048],
}  # fmt: skip

# Each shape once: attention projections (keys and values where they are narrower), then the MLP.
LINEAR_LAYERS: dict[str, list[tuple[int, int]]] = {
    "BERT-base": [(768, 768), (3072, 768), (768, 3072)],
    "BERT-large": [(1024, 1024), (4096, 1024), (1024, 4096)],  # ViT-L's too, at T = 197
    "Llama 1B": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)],
    "Llama 8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}

# ((before, after), pixels of a side, kernel, stride): a stage's first and its typical layers.
CONV_LAYERS: dict[str, list[tuple[tuple[int, int], int, int, int]]] = {
    "ResNet-50": [
        ((3, 64), 224, 7, 2),
        ((64, 64), 56, 3, 1),
        ((256, 64), 56, 1, 1),
        ((128, 128), 56, 3, 2),
        ((256, 256), 14, 3, 1),
        ((1024, 256), 14, 1, 1),
        ((512, 512), 7, 3, 1),
        ((512, 2048), 7, 1, 1),
    ],
    "ViT-L": [((3, 1024), 224, 16, 16)],
}


def size_set(device: torch.device) -> str:
    """Return which sizes a benchmark takes.

    Args:
        device: where it runs.

    Returns:
        ``"toy"``, or by the device ``"cpu"`` or ``"gpu"``.
    """
    if not full_size():
        return "toy"
    return "gpu" if device.type == "cuda" else "cpu"
