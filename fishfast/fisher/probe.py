"""Finds out which sample each row of an intercepted call belongs to, by looking at gradients.

No name and no shape is trusted: a row belongs to the sample whose loss has a gradient there. Two
backwards tell which one, without any weight's gradient: of all losses but the largest, and of all
losses, each times a power of two of its own, the largest loss times a large one. A row of one
sample is multiplied by exactly its power, whose exponent names the sample; a row of the largest
loss has a gradient in the second only. A row that mixes samples does neither.

What is learned is a `Layout` by call, trusted in later batches as long as the sizes say the same;
calls whose rows come in no regular order (experts) are looked at in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.rows import NO_GRADIENT, SEVERAL, Layout, Rows, layouts

__all__ = ["RowFinder"]

# Backward of sum(weights * losses) to all intercepted calls.
Backward = Callable[[Tensor], None]

# Powers of two from 2**-8 to 2**7, which fp16 gradients survive; more samples take more digits.
_BASE = 16
# Exponent for the largest loss: other losses would have to be 2**34 times larger to hide it.
_OWN = 10
# Elements of a gradient that are held in float64 at once.
_PART = 2**20


class RowFinder:
    """Knows the rows of the calls that it has seen.

    Attributes:
        irregular: keys of calls whose rows follow no regular order.
    """

    def __init__(self) -> None:
        self._known: dict[Any, dict[Layout, set[int]]] = {}
        self._silent: set[Any] = set()
        self.irregular: set[Any] = set()
        self._observed: dict[Any, Tensor] = {}

    def observe(self, node: Any, x: Tensor | None, grad: Tensor) -> None:
        """Note one number for each row: its gradient along a fixed random direction.

        In float64, so that a gradient times a power of two gives exactly that number times it.
        """
        rows = grad.reshape(prod(node.lead), prod(grad.shape[len(node.lead) :]))
        generator = torch.Generator().manual_seed(rows.shape[1])
        direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        direction = direction.to(rows.device)
        # What is not finite is refused later, by the name of the scores that it ends in. In parts:
        # in float64 the gradient of a language model's outputs would be the largest tensor of all.
        parts = rows.split(max(1, _PART // max(1, rows.shape[1])))
        self._observed[node] = torch.cat(
            [part.double().nan_to_num_(0, 0, 0) @ direction for part in parts]
        )

    def known(self, nodes: Iterable[Any], num_samples: int) -> list[Any]:
        """Give their rows to the calls where they are known; return the other calls.

        A call that no gradient has reached so far keeps ``rows = None`` and is not returned.

        Args:
            nodes: the calls.
            num_samples: B.

        Returns:
            The calls to look at.
        """
        unknown = []
        lengths: set[int] = set()
        flattened = []
        for node in nodes:
            node.rows = None
            layout = self._trusted(node, num_samples, lengths=None)
            if layout is not None:
                node.rows = Rows(node.lead, num_samples, layout)
                if layout == Layout("dim", 0) and len(node.lead) > 1:
                    lengths.add(node.lead[1])
            else:
                flattened.append(node)
        for node in flattened:
            layout = self._trusted(node, num_samples, lengths)
            if layout is not None:
                node.rows = Rows(node.lead, num_samples, layout)
            elif key_of(node) not in self._silent:
                unknown.append(node)
        return unknown

    def _trusted(self, node: Any, num_samples: int, lengths: set[int] | None) -> Layout | None:
        """Return a layout seen before that fits.

        Rows that are flattened must number B times a length that this call was seen with, or that
        other calls of this forward have: an expert that got a part of the tokens must not pass for
        a layer that got them all.
        """
        if num_samples == 1:
            return Layout("one")
        key = key_of(node)
        if key in self.irregular:
            return None
        for layout, seen in self._known.get(key, {}).items():
            if layout.kind == "dim":
                if node.lead[layout.dim] == num_samples:
                    return layout
            elif lengths is not None and node.lead[0] in {n * num_samples for n in seen | lengths}:
                return layout
        return None

    def find(
        self, nodes: list[Any], num_samples: int, losses: Tensor, backward: Backward
    ) -> tuple[list[Any], list[Any]]:
        """Look at the rows of calls and give them to the nodes.

        Args:
            nodes: what to look at.
            num_samples: B.
            losses: the losses, for their sizes; their graph is kept.
            backward: runs a backward with one weight per loss.

        Returns:
            The calls where a row has several samples, and the calls that any gradient reached.
        """
        own = int(losses.detach().argmax())  # a sample without labels has no gradient to look at
        alone = torch.zeros(num_samples, device=losses.device, dtype=losses.dtype)
        alone[own] = 1
        others = self._signatures(backward, 1 - alone)
        digits, place = [], 1
        while place < num_samples:
            exponents = (torch.arange(num_samples, device=losses.device) // place) % _BASE
            tags = torch.pow(2.0, exponents - _BASE // 2).to(losses.dtype)
            tags[own] = 2.0**_OWN
            digits.append(self._signatures(backward, tags))
            place *= _BASE
        several, reached = [], []
        for node in nodes:
            if node not in others:
                continue
            samples = _samples(others[node], [d[node] for d in digits], own)
            samples[samples >= num_samples] = SEVERAL
            if (samples != NO_GRADIENT).any():
                reached.append(node)
                self._silent.discard(key_of(node))
            else:
                self._silent.add(key_of(node))
            if (samples == SEVERAL).any():
                several.append(node)
            else:
                self._learn(node, samples, num_samples)
        return several, reached

    def _signatures(self, backward: Backward, weights: Tensor) -> dict[Any, Tensor]:
        self._observed = {}
        backward(weights)
        observed, self._observed = self._observed, {}
        return observed

    def _learn(self, node: Any, samples: Tensor, num_samples: int) -> None:
        """Give the node its rows; remember the layout where only one fits."""
        key, seen = key_of(node), samples >= 0
        fitting = [
            layout
            for layout in layouts(node.lead, num_samples)
            if torch.equal(
                layout.samples(node.lead, num_samples, samples.device)[seen], samples[seen]
            )
        ]
        if not bool(seen.any()):
            return
        if not fitting:
            self.irregular.add(key)
            node.rows = Rows(node.lead, num_samples, samples=samples)
            return
        node.rows = Rows(node.lead, num_samples, fitting[0])
        if len(fitting) == 1 and len(samples[seen].unique()) > 1:
            lengths = self._known.setdefault(key, {}).setdefault(fitting[0], set())
            lengths.add(node.lead[0] // num_samples)


def key_of(node: Any) -> Any:
    """Return what stays the same when a model calls the same weights in the next forward."""
    names = tuple(None if operand is None else operand.names for operand in node.operands)
    return type(node.rule), names, len(node.lead)


def _samples(others: Tensor, digits: list[Tensor], own: int) -> Tensor:
    """Return the sample of each row, `NO_GRADIENT` or `SEVERAL`."""
    samples = torch.zeros(len(others), dtype=torch.int64, device=others.device)
    place = 1
    exact = torch.ones_like(samples, dtype=torch.bool)
    for tagged in digits:
        exponent = torch.log2(tagged / others).round()
        digit = exponent + _BASE // 2
        exact &= (tagged == others * torch.pow(2.0, exponent)) & (digit >= 0) & (digit < _BASE)
        samples += place * digit.nan_to_num(0, 0, 0).long()
        place *= _BASE
    samples[~exact] = SEVERAL
    silent = others == 0
    samples[silent] = torch.where(digits[0][silent] != 0, own, NO_GRADIENT)
    return samples
