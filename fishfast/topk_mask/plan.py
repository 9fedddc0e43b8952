"""What a call asks for, checked: scores, rules and who computes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishfast import _backend
from fishfast._names import split_by_rule
from fishfast.topk_mask.batches import Batches, Passes
from fishfast.topk_mask.budget import everything_of
from fishfast.topk_mask.checks import Scores, check_scores
from fishfast.topk_mask.radix import zeros_of
from fishfast.topk_mask.select_cpu import CpuPasses
from fishfast.topk_mask.select_torch import TorchPasses

__all__ = ["Plan", "make_plan"]

_PASSES: dict[str, type[Passes]] = {"cpu": CpuPasses, "torch": TorchPasses}


@dataclass(frozen=True)
class Plan:
    """Checked scores and rules.

    Attributes:
        scores: name -> scores of this process.
        device: where they are.
        kept: names that are always in the mask.
        eligible: names that compete for the rest.
        passes: what computes.
        uncounted: names of copies that another process counts.
    """

    scores: Mapping[str, Scores]
    device: torch.device
    kept: Sequence[str]
    eligible: Sequence[str]
    passes: type[Passes]
    uncounted: frozenset[str] = frozenset()

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(score.shape) for name, score in self.scores.items()}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Name -> number of scores."""
        return {name: score.numel() for name, score in self.scores.items()}

    @functools.cached_property
    def counted_sizes(self) -> dict[str, int]:
        """Name -> number of scores that this process counts."""
        return {n: 0 if n in self.uncounted else size for n, size in self.sizes.items()}

    def batches(self, names: Iterable[str]) -> Batches:
        """Return the named scores of this process."""
        return Batches({name: self.scores[name] for name in names}, self.passes)

    def counted(self, names: Collection[str]) -> Batches | None:
        """Return those that this process counts, where they are not all that it has."""
        if self.uncounted.isdisjoint(names):
            return None
        nothing = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        return Batches(
            {n: nothing if n in self.uncounted else self.scores[n] for n in names}, self.passes
        )

    def everything_kept(self) -> dict[str, Tensor]:
        """Return all indices of the kept parameters."""
        return everything_of(self.kept, self.sizes, self.device)

    def check_aside(self, compared: Iterable[str]) -> int:
        """Refuse bad scores among those not compared; return how many kept scores are 0."""
        compared, kept = set(compared), set(self.kept)
        aside = [name for name in self.scores if name not in compared]
        zeros = zeros_of(self.batches(aside))
        return sum(number for name, number in zip(aside, zeros, strict=True) if name in kept)


def make_plan(
    scores: Mapping[str, Any],
    keep: str | Iterable[str],
    exclude: str | Iterable[str],
    backend: str,
) -> Plan:
    """Check what a call was given; the errors are those of `top_k_mask`."""
    device = check_scores(scores)
    kept, eligible = split_by_rule(list(scores), keep, exclude)
    passes = _PASSES[_backend.choose("topk_mask", device, backend)]
    detached = {name: s.detach() if isinstance(s, Tensor) else s for name, s in scores.items()}
    return Plan(detached, device, kept, eligible, passes)
