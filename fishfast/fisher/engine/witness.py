"""Shows whether a backward through Python treats each sample by itself.

A hook that scales by the whole gradient's norm, or a custom function that normalises over the
batch, gives a row another gradient when other samples' losses weigh less. So the rows' gradients
are compared with those of losses that are halved or quartered: a row of one sample is then, but for
what underflows, exactly a half or a quarter of what it was. No loss weighs 1, so that no gradient
that clipping leaves as it is hides the others that it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Witness"]

# Units in the last place of a sample's gradient, for devices that add in another order each time.
_ROUNDING, _LARGEST = 16, 0.03


class Witness:
    """The gradients of losses with weights of their own.

    Args:
        signature: returns one number for each row of a call's gradient.
        calls: the calls to look at.
        num_samples: B.
        counted: how many samples are scored.

    Attributes:
        weights: the weights of the losses, ``[B]``.
    """

    def __init__(
        self, signature: Callable[[Any, Tensor], Tensor], calls: set[Any], num_samples: int,
        counted: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(num_samples)
        halved = torch.rand(num_samples, generator=generator) < 0.5
        self.weights = torch.where(halved, 0.5, 0.25).double()
        self.weights[counted:] = 0
        self._signature, self._calls, self._counted = signature, calls, counted
        self._seen: dict[Any, Tensor] = {}

    def observe(self, node: Any, x: Tensor | None, grad: Tensor) -> None:
        """Note the rows' gradients."""
        if node in self._calls:
            self._seen[node] = self._signature(node, grad)

    def agrees(self, node: Any, grad: Tensor) -> bool:
        """Return whether a call's gradient is what the weighted one says, sample by sample."""
        if node not in self._calls or node.rows is None:
            return True
        now = self._signature(node, grad)
        weighted = self._seen.get(node, torch.zeros_like(now))
        samples = node.rows.samples(grad.device)
        scored = (samples >= 0) & (samples < self._counted)
        weights = self.weights.to(grad.device)[samples.clamp(min=0)]
        wrong = torch.where(scored, now * weights - weighted, now.abs() + weighted.abs())
        size = grad.reshape(prod(node.lead), -1).double().norm(dim=1)
        of = torch.where(scored, samples, self._counted)
        wrong, size = (
            torch.zeros(self._counted + 1, dtype=torch.float64, device=grad.device).index_add(
                0, of, values.square()
            )
            for values in (wrong, size)
        )
        tolerance = min(_ROUNDING * torch.finfo(grad.dtype).eps, _LARGEST)
        size[-1] = 0  # rows of no sample have no gradient
        return bool((wrong <= tolerance**2 * size).all())
