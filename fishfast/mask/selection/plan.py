"""What a call asks for, checked: scores, rules and who computes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.mask.budget import everything_of
from fishfast.mask.names import split_by_rule
from fishfast.mask.selection.batches import Batches, Passes
from fishfast.mask.selection.checks import Scores, check_scores
from fishfast.mask.selection.cpu import CpuPasses
from fishfast.mask.selection.cuda import select_cuda
from fishfast.mask.selection.radix import Processes, select, zeros_of
from fishfast.mask.selection.torch_passes import TorchPasses
from fishfast.mask.sparse_mask import SparseMask, index_dtype

__all__ = ["Plan", "make_plan"]

# "cuda" selects in one call; what it has no part in, scores that do not compete, is torch's.
_PASSES: dict[str, type[Passes]] = {"cpu": CpuPasses, "cuda": TorchPasses, "torch": TorchPasses}


@dataclass(frozen=True)
class Plan:
    """Checked scores and rules.

    Attributes:
        scores: name -> scores of this process.
        device: where they are.
        kept: names that are always in the mask.
        eligible: names that compete for the rest.
        backend: what computes: ``"cuda"``, ``"cpu"`` or ``"torch"``.
        uncounted: names of copies that another process counts.
    """

    scores: Mapping[str, Scores]
    device: torch.device
    kept: Sequence[str]
    eligible: Sequence[str]
    backend: str
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
        return Batches({name: self.scores[name] for name in names}, _PASSES[self.backend])

    def counted(self, names: Collection[str]) -> Batches | None:
        """Return those that this process counts, where they are not all that it has."""
        if self.uncounted.isdisjoint(names):
            return None
        nothing = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        scores = {n: nothing if n in self.uncounted else self.scores[n] for n in names}
        return Batches(scores, _PASSES[self.backend])

    def select(
        self, names: Sequence[str], count: int, processes: Processes
    ) -> tuple[list[Tensor], int]:
        """Select the largest scores of the named tensors: `radix.select`, or the same in CUDA."""
        if self.backend == "cuda":
            tensors = [self.scores[name] for name in names]  # no file: those are on the CPU
            return select_cuda(names, cast(list[Tensor], tensors), count)
        return select(self.batches(names), count, processes, self.counted(names))

    def mask(self, indices: Mapping[str, Tensor], num_zero_score: int) -> SparseMask:
        """Return the mask of indices made for it; a name without any selects nothing."""
        complete = {
            name: indices[name]
            if name in indices
            else torch.empty(0, dtype=index_dtype(size), device=self.device)
            for name, size in self.sizes.items()
        }
        return SparseMask._adopt(complete, self.shapes, num_zero_score)

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
    *,
    alone: bool = True,
) -> Plan:
    """Check what a call was given, ``alone`` or with other processes; raises as `top_k_mask`."""
    device = check_scores(scores)
    kept, eligible = split_by_rule(list(scores), keep, exclude)
    chosen = _backend.choose("topk_mask", device, backend)
    if chosen == "cuda" and not alone:
        if backend != "auto":
            raise ValueError(
                f"backend {backend!r} selects from the scores of one process; with process_group "
                "choose 'auto' or 'torch'"
            )
        chosen = "torch"
    detached = {
        name: score.detach().resolve_neg() if isinstance(score, Tensor) else score
        for name, score in scores.items()
    }
    return Plan(detached, device, kept, eligible, chosen)
