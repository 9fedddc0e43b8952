"""Goes through the batches, with a progress bar, and with a file to stop and go on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from fishfast.fisher.engine.blame import blame
from fishfast.fisher.engine.scorer import NotFinite, Scorer
from fishfast.fisher.result import Fisher
from fishfast.fisher.running import RunningScores

__all__ = ["Run"]


class Run:
    """Goes through the batches, with a file to stop and go on."""

    def __init__(self, scorer: Scorer, fisher_type: str, limit: int | None) -> None:
        self.scorer, self.fisher_type, self.limit = scorer, fisher_type, limit
        self.running: RunningScores | None = None
        self.num_samples = self.num_batches = 0

    def result(self, scores: Mapping[str, Tensor], num_samples: int, num_batches: int) -> Fisher:
        """Return scores with what is known about them."""
        scorer = self.scorer
        return Fisher(
            scores, num_samples, scorer.fallback, num_batches=num_batches,
            fisher_type=self.fisher_type, power=scorer.add.power, roads=scorer.roads,
            passes=scorer.costs.passes, seconds=scorer.costs.seconds,
        )  # fmt: skip

    def _so_far(self) -> Fisher:
        return self.result(self.scorer.scores.kept, self.num_samples, self.num_batches)

    def score(self, batches: Iterable[Any], progress: bool) -> None:
        """Score what is left of the batches."""
        if self.running is not None:
            power = self.scorer.add.power
            before = self.running.resume(self.scorer.scores.kept, self.fisher_type, power)
            if before is not None:
                self.scorer.go_on(before)
                self.num_samples, self.num_batches = before.num_samples, before.num_batches
        if self.limit is not None and self.num_samples > self.limit:
            raise ValueError(
                f"num_samples must be at least the {self.num_samples} samples that the file of "
                f"resume_path has; got {self.limit}; give another path"
            )
        if self.num_samples == self.limit:
            return
        total = self.limit if self.limit is not None else _num_samples(batches)
        whole = True  # running scores are saved between batches only
        try:
            with tqdm(
                total=total, initial=self.num_samples, disable=not progress, unit=" samples",
                desc="fisher",
            ) as bar:  # fmt: skip
                for batch in self._not_scored(batches):
                    left = None if self.limit is None else self.limit - self.num_samples
                    whole = False
                    try:
                        counted, size = self.scorer.add_batch(batch, left)
                    except NotFinite:
                        raise ValueError(blame(self.scorer, batch)) from None
                    self.num_samples += counted
                    self.num_batches += 1
                    whole = counted == size
                    bar.update(counted)
                    if self.num_samples == self.limit:
                        break
                    if self.running is not None:
                        self.running.maybe_save(self._so_far)
        finally:
            if self.running is not None and whole and self.num_batches:
                self.running.save_now(self._so_far())
        self.scorer.finish()
        if self.limit is not None and self.num_samples < self.limit:
            warnings.warn(
                f"num_samples={self.limit}, but batches gave only {self.num_samples} samples",
                stacklevel=3,
            )

    def _not_scored(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass over the batches that the file's run has scored."""
        before = self.num_batches
        place = -1
        for place, batch in enumerate(batches):
            if place == 0 and self.running is not None:
                self.running.compare_batch(_shapes(batch))
            if place >= before:
                yield batch
        if place + 1 < before:
            raise ValueError(
                f"batches must begin with the {before} that the file of resume_path has; got "
                f"{place + 1}; give the same batches, or another path"
            )


def _shapes(batch: Any) -> str:
    """Return the shapes of a batch's tensors."""
    return str([tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)])


def _num_samples(batches: Any) -> int | None:
    """Return how many samples a DataLoader gives, where it knows."""
    try:
        return len(batches.sampler)
    except (AttributeError, TypeError):
        return None
