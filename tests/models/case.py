"""A model with batches and a per-sample loss: what every model here is handed out as."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# What a report says of the parameters that are batched, and of those that are not used.
BATCHED = "batched"
MEETS_DATA = "batched, where it meets the data"
SORTED = "batched, rows sorted by sample"
UNUSED = "not used"


@dataclasses.dataclass
class Case:
    """A model, batches for it, and how to score it.

    Attributes:
        model: in train mode, as a user would hand it over.
        batches: of different sizes.
        loss_fn: ``loss_fn(model, batch) -> [B]``.
        fallback: names that must be scored one sample at a time; every other one must be batched.
        roads: pattern of names -> the road that the report must give them; the first that fits
            counts. Names without one must be `BATCHED`.
        take: ``take(batch, b)`` is the batch of sample b alone, None past the end.
        plain: ``plain(model)`` is the same model in a form that plain torch can differentiate.
    """

    model: nn.Module
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], torch.Tensor]
    fallback: set[str] = dataclasses.field(default_factory=set)
    roads: dict[str, str] = dataclasses.field(default_factory=dict)
    take: Callable[[Any, int], Any] | None = None
    plain: Callable[[nn.Module], nn.Module] | None = None

    def __post_init__(self):
        self.take = self.take or only
        # Biases and norms start at 0 and 1, where errors in them do not show.
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn(p.shape))

    def road(self, name):
        """Return the road that a batched parameter must take, as a pattern."""
        fitting = (road for pattern, road in self.roads.items() if fnmatch.fnmatch(name, pattern))
        return next(fitting, BATCHED)


class Calls(nn.Module):
    """Submodules, parameters and buffers by name, and a function that uses them."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def only(batch, b):
    """Return sample b of a batch whose tensors have the samples on dim 0; None past the end."""
    if isinstance(batch, Mapping):
        parts = {name: only(value, b) for name, value in batch.items()}
        return None if None in [*parts.values()] else parts
    if isinstance(batch, (tuple, list)):
        parts = [only(value, b) for value in batch]
        return None if any(part is None for part in parts) else type(batch)(parts)
    return batch[b : b + 1] if b < len(batch) else None


def classify(model, batch):
    """Cross entropy of ``model(x)`` against y, for ``(x, y)``."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def per_sample(model, batch):
    """Squared outputs weighted unevenly, averaged over everything but dim 0."""
    out = model(batch[0] if isinstance(batch, tuple) else batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype, device=out.device)
    weights = weights.view_as(out[0])
    return (out.square() * weights + out * weights).flatten(1).mean(1)


def images(*sizes, channels=3, side=9, dims=2):
    return [
        (torch.randn(b, channels, *[side] * dims), torch.randint(0, 4, (b,))) for b in sizes
    ]  # fmt: skip


def vectors(*sizes, width=6):
    return [(torch.randn(b, width), torch.randint(0, 4, (b,))) for b in sizes]


def sequences(*sizes, length=5, width=8):
    return [torch.randn(b, length, width) for b in sizes]


def token_ids(*sizes, length=7, vocabulary=11):
    """Few tokens, so that they repeat in a sample and between samples."""
    return [torch.randint(0, vocabulary, (b, length)) for b in sizes]


def next_token(model, tokens):
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
