"""The demo's task: a small network that knows digits 0-4 gets a few images of digits 5-9.

Ten training images per digit: at twenty, every mask of 0.5 % or more came within three points of
training everything (on validation images), and the table could hardly tell them apart. No
augmentation, no weight decay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "DemoUnavailable",
    "DigitNet",
    "Images",
    "Task",
    "Tick",
    "digits",
    "fit",
    "make_task",
    "predict",
]

TRAIN_PER_DIGIT = 10
BATCH_SIZE = 25
_TEST_SEED = 0  # which half of the images is the test set
# Independent random streams of one seed.
_INIT, _PRETRAIN_ORDER, _DRAW, _ORDER, _HEAD, _OTHER_HEAD = range(6)

Module = TypeVar("Module", bound=nn.Module)
Tick = Callable[[], object]


class DemoUnavailable(RuntimeError):
    """The demo cannot run here; the text says what to do."""


class DigitNet(nn.Module):
    """A conv net for 8x8 images and 5 classes: 313 k weights, 325 of them in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(384, 576), nn.LayerNorm(576), nn.ReLU(),
            nn.Linear(576, 64), nn.LayerNorm(64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits ``[B, 5]`` of images ``[B, 1, 8, 8]``."""
        return self.head(self.features(pixels))


@dataclass(frozen=True)
class Images:
    """Pixels ``[B, 1, 8, 8]`` in [0, 1] and labels ``[B]`` from 0 to 4."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class Task:
    """What one seed fixes, the same for every method.

    Attributes:
        seed: of everything random.
        base: network pre-trained on digits 0-4, with a new random head.
        train: 10 images of each digit 5-9.
        validation: the rest of that half, on which the learning rates were chosen.
        test: the other half, the same for every seed, on which nothing was chosen.
    """

    seed: int
    base: DigitNet
    train: Images
    validation: Images
    test: Images

    def network(self) -> DigitNet:
        """Return a copy of the base, to be trained."""
        return copy.deepcopy(self.base)

    def save_base(self, path: Path) -> None:
        """Write what was pre-trained: the base without a head."""
        save_file(self.base.features.state_dict(), path)

    def pristine(self, path: Path) -> DigitNet:
        """Return the base as another process has it: from its file, with another random head."""
        network = _seeded(self.seed, _OTHER_HEAD, DigitNet)
        network.features.load_state_dict(load_file(path))
        return network

    def order(self) -> torch.Generator:
        """Return the generator of the training order: every method sees the same batches."""
        return _generator(self.seed, _ORDER)


def digits() -> tuple[Images, Images]:
    """Return scikit-learn's bundled handwritten digits; nothing is downloaded.

    Returns:
        The 901 images of digits 0-4 and the 896 of digits 5-9, both with labels from 0.

    Raises:
        DemoUnavailable: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoUnavailable(
            "the demo's images come with scikit-learn, which is not installed; "
            'run: pip install "fishfast[demo]"'
        ) from error
    data = load_digits()
    pixels = torch.from_numpy(data.images.astype(np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    old = labels < 5
    return Images(pixels[old], labels[old]), Images(pixels[~old], labels[~old] - 5)


def make_task(seed: int, pretrain_epochs: int, tick: Tick) -> Task:
    """Pre-train a base on digits 0-4 and draw the images of digits 5-9.

    Args:
        seed: of the base, its new head, the drawn images and their order.
        pretrain_epochs: passes over digits 0-4.
        tick: called after each epoch.

    Returns:
        The task.
    """
    old, new = digits()
    pool, test = _split(new, new.labels.bincount() // 2, _generator(_TEST_SEED, _DRAW))
    per_class = torch.full((5,), TRAIN_PER_DIGIT)
    train, validation = _split(pool, per_class, _generator(seed, _DRAW))

    base = _seeded(seed, _INIT, DigitNet)
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3, weight_decay=0.0)
    fit(base, optimizer, old, pretrain_epochs, _generator(seed, _PRETRAIN_ORDER), tick)
    base.head = _seeded(seed, _HEAD, lambda: nn.Linear(64, 5))
    return Task(seed, base, train, validation, test)


def fit(
    network: nn.Module,
    optimizer: Optimizer,
    images: Images,
    epochs: int,
    order: torch.Generator,
    tick: Tick,
) -> list[float]:
    """Train with cross-entropy; the learning rate falls linearly to zero.

    Args:
        network: in train mode, so that BatchNorm's statistics follow the new images.
        optimizer: over what is to be trained.
        images: the training set.
        epochs: passes over it.
        order: shuffles it.
        tick: called after each epoch.

    Returns:
        The mean loss of the images in each epoch, as it was before the step on them.
    """
    network.train()
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=order).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images.pixels[rows]), images.labels[rows])
            loss.backward()
            total += loss.item() * len(rows)
            optimizer.step()
            schedule.step()
        losses.append(total / len(images))
        tick()
    return losses


@torch.no_grad()
def predict(network: nn.Module, images: Images) -> tuple[Tensor, float]:
    """Return the logits in eval mode and the share of right answers in percent."""
    network.eval()
    logits = network(images.pixels)
    right = int((logits.argmax(1) == images.labels).sum())
    return logits, 100 * right / len(images)


def _split(images: Images, counts: Tensor, generator: torch.Generator) -> tuple[Images, Images]:
    """Return ``counts[label]`` random images of each label, and the others."""
    order = torch.randperm(len(images), generator=generator)
    first = torch.zeros(len(images), dtype=torch.bool)
    for label, count in enumerate(counts.tolist()):
        first[order[images.labels[order] == label][:count]] = True
    return images[first], images[~first]


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + stream)


def _seeded(seed: int, stream: int, make: Callable[[], Module]) -> Module:
    """Make a module from a stream of its own, and leave torch's global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + stream)
        return make()
