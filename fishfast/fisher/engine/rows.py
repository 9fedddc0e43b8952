"""Which sample each row of a call belongs to.

A call sees rows: the leading dims of its input, those that its weights do not span. In most models
dim 0 is the sample. Attention in torch.nn runs time first, GPT-2 and routers flatten batch and
time, experts get the tokens that a router sends them. `Layout` is a regular order of rows, `Rows`
holds a layout, or the sample of every row where there is no order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Rows", "bounds_of_blocks", "layouts"]

NO_GRADIENT, SEVERAL = -1, -2


class Layout(NamedTuple):
    """A regular order of rows: the sample is a dim, or dim 0 holds blocks of it or cycles of it."""

    kind: str  # "one" sample, "dim", "blocks" (sample after sample), "cycle" (all samples, again)
    dim: int = 0

    def by_sample(self, tensor: Tensor, lead: tuple[int, ...], num_samples: int) -> Tensor:
        """Return ``[*lead, *rest]`` as ``[B, T, *rest]``, a view where that is possible."""
        if self.kind == "dim" and self.dim == 0 and len(lead) <= 2:  # nearly always
            return tensor if len(lead) == 2 else tensor.unsqueeze(1)
        rest = tensor.shape[len(lead) :]
        if self.kind == "cycle":
            tensor = tensor.unflatten(0, (-1, num_samples)).transpose(0, 1)
        elif self.kind == "dim":
            tensor = tensor.movedim(self.dim, 0)
        return tensor.reshape(num_samples, prod(lead) // num_samples, *rest)

    def samples(self, lead: tuple[int, ...], num_samples: int, device: torch.device) -> Tensor:
        """Return the sample of each row, ``[N]``."""
        places = torch.arange(prod(lead), device=device)
        of = torch.empty_like(places)
        of[self.by_sample(places.view(lead), lead, num_samples)] = torch.arange(
            num_samples, device=device
        ).unsqueeze(1)
        return of

    def step(self, call: Any, num_samples: int) -> int:
        """Return how far apart samples are in a call's result, counted in elements."""
        shape = call._input_metadata[0].shape
        if self.kind == "dim":
            return prod(shape[self.dim + 1 :])
        return prod(shape) // num_samples if self.kind == "blocks" else prod(shape[1:])


def layouts(lead: tuple[int, ...], num_samples: int) -> list[Layout]:
    """Return the layouts that rows of these sizes can have, the usual first."""
    if num_samples == 1:
        return [Layout("one")]
    found = [Layout("dim", dim) for dim, size in enumerate(lead) if size == num_samples]
    if lead and lead[0] != num_samples and lead[0] % num_samples == 0:
        found += [Layout("blocks"), Layout("cycle")]
    return found


class Rows:
    """The samples of a call's rows.

    Args:
        lead: sizes of the dims that count rows.
        num_samples: B.
        layout: the regular order, or
        samples: the sample of each row, ``[N]``; negative where a row has no gradient.
    """

    def __init__(
        self,
        lead: tuple[int, ...],
        num_samples: int,
        layout: Layout | None = None,
        samples: Tensor | None = None,
    ) -> None:
        self.lead, self.num_samples = lead, num_samples
        self.layout, self._samples = layout, samples

    def samples(self, device: torch.device) -> Tensor:
        """Return the sample of each row, ``[N]``."""
        if self.layout is not None:
            return self.layout.samples(self.lead, self.num_samples, device)
        assert self._samples is not None
        return self._samples.to(device)

    @functools.cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """Rows with a gradient, sample by sample, and how many each sample has."""
        assert self._samples is not None
        order = torch.argsort(self._samples, stable=True)
        order = order[self._samples[order] >= 0]
        return order, torch.bincount(self._samples[order], minlength=self.num_samples)

    def by_sample(self, tensor: Tensor) -> Tensor | None:
        """Return ``[*lead, *rest]`` as ``[B, T, *rest]``; None where samples differ in length."""
        if self.layout is None:
            return None
        return self.layout.by_sample(tensor, self.lead, self.num_samples)

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return ``[*lead, rest]`` as ``[B, T, rest]``; only where there is a layout."""
        layout, lead = self.layout, self.lead
        assert layout is not None
        if len(lead) == 2 and layout.dim == 0 and layout.kind == "dim":  # nearly always
            return tensor
        return layout.by_sample(tensor, lead, self.num_samples)

    def packed(self, *tensors: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return tensors as ``[N, rest]`` with the rows of a sample side by side.

        Args:
            tensors: ``[*lead, rest]``; the first one is the gradient, whose zero rows at the end
                of a sample (padding) are left out.

        Returns:
            The tensors, and the first row of each sample and the one after its last, ``[B]``.
        """
        if self.layout is None:
            order, lengths = (t.to(tensors[0].device) for t in self._order)
            ends = lengths.cumsum(0)
            flat = [t.reshape(-1, t.shape[-1]).index_select(0, order) for t in tensors]
            return flat, ends - lengths, ends
        blocks = [self.layout.by_sample(t, self.lead, self.num_samples) for t in tensors]
        starts, ends = bounds_of_blocks(blocks[0])
        return [t.reshape(-1, t.shape[-1]) for t in blocks], starts, ends

    def split(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield ``[rows of the sample, *rest]`` for each sample."""
        blocks = self.by_sample(tensor)
        if blocks is not None:
            yield from blocks
            return
        order, lengths = (t.to(tensor.device) for t in self._order)
        flat = tensor.reshape(-1, *tensor.shape[len(self.lead) :])
        yield from flat.index_select(0, order).split(lengths.tolist())

    def sums(self, tensor: Tensor) -> Tensor:
        """Return the fp32 sum of each sample's rows, ``[B, *rest]``."""
        blocks = self.by_sample(tensor)
        if blocks is not None:
            return blocks.sum(1, dtype=torch.float32)
        order, lengths = (t.to(tensor.device) for t in self._order)
        rest = tensor.shape[len(self.lead) :]
        flat = tensor.reshape(-1, prod(rest)).index_select(0, order).float()
        # segment_reduce adds the rows of a segment in order on every device: no float atomics.
        summed = torch.segment_reduce(flat, "sum", lengths=lengths, axis=0, initial=0)
        return summed.view(-1, *rest)


def bounds_of_blocks(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row of each sample and the one after its last that is not zero, ``[B]``.

    Args:
        grad: ``[B, T, rest]``, whose rows are counted sample by sample.
    """
    num_samples, length, device = len(grad), grad.shape[1], grad.device
    starts, ends = _bounds(num_samples, length, device)
    # Where asking costs nothing, first whether there is any padding at all (or any row).
    if length > 1 and (device.type != "cpu" or not bool(grad[:, -1].any(-1).all())):
        ends = starts + (_places(length, device) * (grad != 0).any(-1)).amax(1)
    return starts, ends


@functools.lru_cache(maxsize=64)
def _bounds(num_samples: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first row of samples of one length, and the one after the last."""
    bounds = torch.arange(num_samples + 1, device=device) * length
    return bounds[:-1], bounds[1:]


@functools.lru_cache(maxsize=64)
def _places(length: int, device: torch.device) -> Tensor:
    return torch.arange(1, length + 1, device=device)
