"""Shapes that several benchmarks share: whole models, and the layers of models by name.

The whole models are arguments of `fisher_models.build`. A layer is what one kernel sees: a matrix
as (outputs, inputs), a convolution as (channels, pixels, kernel, stride).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import full_size

__all__ = [
    "BERT_LARGE", "CONV_LAYERS", "FISHER_MODELS", "LINEAR_LAYERS", "LLAMA_1B", "MODELS", "count",
    "parameter_sizes", "size_set",
]  # fmt: skip

BERT_LARGE: dict[str, Any] = {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 30522}
# TinyLlama, 1.1 B parameters.
LLAMA_1B: dict[str, Any] = {
    "layers": 22, "hidden": 2048, "heads": 32, "intermediate": 5632, "vocab": 32000,
}  # fmt: skip
RESNET_50: dict[str, Any] = {
    "layer": "bottleneck", "depths": [3, 4, 6, 3], "widths": [256, 512, 1024, 2048],
}  # fmt: skip

VIT_LARGE: dict[str, Any] = {"layers": 24, "hidden": 1024, "heads": 16}

# Whole models that are scored, by the set of sizes.
FISHER_MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "toy": {
        "bert": {"layers": 2, "hidden": 32, "heads": 2, "vocab": 100, "length": 16,
                 "batch_size": 3, "batches": 2},
        "llama": {"layers": 2, "hidden": 32, "heads": 8, "intermediate": 48, "vocab": 100,
                  "length": 16, "batch_size": 3, "batches": 2},
        "resnet": {"layer": "basic", "depths": [1, 1], "widths": [8, 16], "side": 32,
                   "batch_size": 3, "batches": 2},
        "convnet": {"widths": [8, 8, 16], "side": 16, "batch_size": 3, "batches": 2},
    },
    "cpu": {  # the cheap ones first: where time is short all begin
        "convnet": {"widths": [64, 64, 128, 128], "side": 32, "batch_size": 32, "batches": 16},
        "resnet": {"layer": "basic", "depths": [2, 2, 2, 2], "widths": [64, 128, 256, 512],
                   "side": 64, "batch_size": 16, "batches": 16},
        "llama": {"layers": 4, "hidden": 512, "heads": 8, "intermediate": 1376, "vocab": 8000,
                  "length": 128, "batch_size": 4, "batches": 16},
        "bert": {"layers": 4, "hidden": 512, "heads": 8, "vocab": 30522, "length": 128,
                 "batch_size": 8, "batches": 16},
    },
    "gpu": {
        "bert": {**BERT_LARGE, "length": 128, "batch_size": 32, "batches": 8},
        "llama": {**LLAMA_1B, "length": 512, "batch_size": 8, "batches": 8},
        "resnet": {**RESNET_50, "side": 224, "batch_size": 64, "batches": 4},
        "vit": {**VIT_LARGE, "side": 224, "batch_size": 64, "batches": 4},
        "convnet": {"widths": [64, 128, 128, 256], "side": 64, "batch_size": 128, "batches": 4},
    },
}  # fmt: skip

# Each shape once: attention projections (keys and values where they are narrower), then the MLP.
LINEAR_LAYERS: dict[str, list[tuple[int, int]]] = {
    "BERT-base": [(768, 768), (3072, 768), (768, 3072)],
    "BERT-large": [(1024, 1024), (4096, 1024), (1024, 4096)],
    "ViT-L": [(1024, 1024), (4096, 1024), (1024, 4096)],  # at T = 197
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


def _encoder(layers: int, hidden: int) -> list[int]:
    """Return the sizes of a transformer's layers: four projections, the MLP, two norms."""
    matrices = [hidden * hidden] * 4 + [4 * hidden * hidden] * 2
    vectors = [hidden] * 4 + [4 * hidden, hidden] + [hidden] * 4
    return (matrices + vectors) * layers


def _bert(layers: int, hidden: int) -> list[int]:
    embeddings = [30522 * hidden, 512 * hidden, 2 * hidden, hidden, hidden]
    return [*embeddings, *_encoder(layers, hidden), hidden * hidden, hidden]  # and the pooler


def _vit_large() -> list[int]:
    patches = [1024, 197 * 1024, 3 * 16 * 16 * 1024, 1024]
    return [*patches, *_encoder(24, 1024), 1024, 1024, 1000 * 1024, 1000]


def _llama(layers: int, hidden: int, keys: int, intermediate: int, vocab: int) -> list[int]:
    layer = [hidden * hidden] * 2 + [keys * hidden] * 2 + [intermediate * hidden] * 3 + [hidden] * 2
    return [vocab * hidden, *layer * layers, hidden, vocab * hidden]


def _resnet_50() -> list[int]:
    sizes, before = [3 * 64 * 7 * 7, 64, 64], 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            after = 4 * width
            convs = [(before * width, width), (9 * width * width, width), (width * after, after)]
            if block == 0:
                convs.append((before * after, after))  # the shortcut
            for weights, channels in convs:
                sizes += [weights, channels, channels]  # and its batch norm
            before = after
    return [*sizes, 2048 * 1000, 1000]


MODELS: dict[str, Callable[[], list[int]]] = {
    "ResNet-50": _resnet_50,
    "BERT-base": lambda: _bert(12, 768),
    "ViT-L": _vit_large,
    "BERT-large": lambda: _bert(24, 1024),
    "Llama 1B": lambda: _llama(22, 2048, 256, 5632, 32000),
    "Llama 8B": lambda: _llama(32, 4096, 1024, 14336, 128256),
}


def parameter_sizes(model: str) -> list[int]:
    """Return how many weights each parameter of a whole model has.

    Args:
        model: one of `MODELS`.
    """
    return MODELS[model]()


def count(number: int) -> str:
    """Return a number for a title, exactly: 1e7, 2^25, 25,557,032."""
    digits, exponent = f"{number:.0e}".split("e")
    if number == int(digits) * 10 ** int(exponent):
        return f"{digits}e{int(exponent)}"
    if number & (number - 1) == 0:
        return f"2^{number.bit_length() - 1}"
    return f"{number:,}"


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
