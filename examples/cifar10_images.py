"""CIFAR-10 as tensors, from its folder or from the hub, and what `--smoke` draws instead."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Images(NamedTuple):
    """Pixels ``[N, 3, 32, 32]``, normalised, and labels ``[N]``."""

    pixels: Tensor
    labels: Tensor


def normalised(pixels: np.ndarray, labels: Any) -> Images:
    """Turn bytes ``[N, 3, 32, 32]`` into numbers around zero, by CIFAR-10's mean and deviation."""
    mean, deviation = torch.tensor([[125.31, 122.95, 113.87], [62.99, 62.09, 66.70]])
    floats = torch.from_numpy(pixels).float()
    floats = (floats - mean[:, None, None]) / deviation[:, None, None]
    return Images(floats, torch.as_tensor(labels, dtype=torch.int64))


def read_cifar10(data: str) -> tuple[Images, Images]:
    """Read the training and test images.

    Args:
        data: the folder ``cifar-10-batches-py``, or "hub". Its files are pickles, which run code
            when they are read: take them from where you trust them.

    Returns:
        50,000 and 10,000 images.
    """
    if data == "hub":
        from datasets import load_dataset

        found = load_dataset("uoft-cs/cifar10").with_format("numpy")
        train, test = (
            normalised(found[s]["img"][:].transpose(0, 3, 1, 2), found[s]["label"][:])
            for s in ("train", "test")
        )
        return train, test

    def batches(*names: str) -> Images:
        read = [pickle.loads((Path(data) / name).read_bytes(), encoding="bytes") for name in names]
        pixels = np.concatenate([batch[b"data"] for batch in read]).reshape(-1, 3, 32, 32)
        return normalised(pixels, [label for batch in read for label in batch[b"labels"]])

    return batches(*(f"data_batch_{i}" for i in range(1, 6))), batches("test_batch")


def drawn_images(count: int, seed: int) -> Images:
    """Draw noisy stripes in ten directions, one a class: what `--smoke` trains on."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    y, x = np.mgrid[:32, :32]
    angle = labels[:, None, None] * np.pi / 10
    phase = draw.uniform(0, 2 * np.pi, (count, 1, 1))
    stripes = np.sin(0.7 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    pixels = 128 + 50 * stripes[:, None] + draw.normal(0, 25, (count, 3, 32, 32))
    return normalised(pixels.clip(0, 255).astype(np.uint8), labels)


def shuffled(images: Images, size: int, order: torch.Generator, augment: bool) -> Iterator[Images]:
    """Yield shuffled batches; augmented ones are shifted by up to 4 pixels and flipped."""
    for rows in torch.randperm(len(images.labels), generator=order).split(size):
        pixels = images.pixels[rows.to(images.pixels.device)]
        if augment:
            padded = F.pad(pixels, (4, 4, 4, 4), mode="reflect")
            corners = torch.randint(0, 9, (len(rows), 2), generator=order).tolist()
            pixels = torch.stack(
                [p[:, i : i + 32, j : j + 32] for p, (i, j) in zip(padded, corners, strict=True)]
            )
            flip = (torch.rand(len(rows), generator=order) < 0.5).to(pixels.device)
            pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        yield Images(pixels, images.labels[rows.to(pixels.device)])
