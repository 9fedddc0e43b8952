"""Optimizer steps of many tiny tensors, timed by the CPU time of the one thread that takes them.

With tiny tensors a step is what the host does around the update: checks, tables, a call. That is
what a GPU would wait for. Gradients come from a real backward, which leaves the caches as in
training, and is outside the clock. Contenders take turns, so that a busy machine slows all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fishfast as ff

__all__ = ["CONTENDERS", "NUM_TENSORS", "Contender", "turns"]

NUM_TENSORS = 400
_SIZE, _DENSITY = 8, 0.25

# Torch's, on the same k values, write no weight.
CONTENDERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fishfast AdamW": lambda p: ff.AdamW(p, lr=1e-3),
    "fishfast Adam": lambda p: ff.Adam(p, lr=1e-3),
    "fishfast SGD": lambda p: ff.SGD(p, lr=1e-3, momentum=0.9),
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True),
    "torch AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, foreach=True),
}


class Contender:
    """A model of tiny layers and an optimizer over its compact values.

    Args:
        make: the optimizer from its parameters.
        num_tensors: how many layers.
    """

    def __init__(
        self, make: Callable[[Any], torch.optim.Optimizer], num_tensors: int = NUM_TENSORS
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList(nn.Linear(_SIZE, _SIZE, bias=False) for _ in range(num_tensors))
        self.tuned = ff.train_only(self.model, ff.random_mask(self.model, density=_DENSITY, seed=0))
        self.optimizer = make(self.tuned.parameters())
        self._input = torch.ones(2, _SIZE)

    def backward(self) -> None:
        """Make gradients, as training does."""
        self.optimizer.zero_grad()
        torch.stack([layer(self._input).sum() for layer in self.model]).sum().backward()

    def microseconds(self) -> float:
        """Return the CPU time of a step."""
        start = time.thread_time_ns()
        self.optimizer.step()
        return (time.thread_time_ns() - start) / 1e3


def turns(
    contenders: dict[str, Contender], repeats: int, fresh: bool = True
) -> dict[str, list[float]]:
    """Return the microseconds of each contender's steps, taken in turns on one thread.

    Args:
        contenders: by name.
        repeats: how many steps of each.
        fresh: a backward before each step; else only one, and its gradients are stepped again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for contender in contenders.values():
            for _ in range(3):  # the first is checked in full
                contender.backward()
                contender.optimizer.step()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, contender in contenders.items():
                if fresh:
                    contender.backward()
                else:
                    contender.optimizer.step()  # so that the caches are warm
                times[name].append(contender.microseconds())
    finally:
        torch.set_num_threads(threads)
    return times
