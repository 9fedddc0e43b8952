"""`Fisher`: what scoring gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tabulate import tabulate
from torch import Tensor

__all__ = ["Fisher"]


class Fisher(Mapping[str, Tensor]):
    """Scores by parameter name, each fp32 and of the parameter's shape.

    Attributes:
        num_samples: how many samples were summed.
        fallback: name -> reason, for parameters whose gradients were taken one sample at a time.
    """

    def __init__(
        self, scores: Mapping[str, Tensor], num_samples: int, fallback: Mapping[str, str]
    ) -> None:
        self._scores = dict(scores)
        self.num_samples = num_samples
        self.fallback = dict(fallback)

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        weights = sum(score.numel() for score in self.values())
        return (
            f"Fisher({weights:,} weights in {len(self)} tensors, {self.num_samples:,} samples, "
            f"{len(self.fallback)} tensors one sample at a time)"
        )

    def report(self) -> str:
        """Return a table: each parameter, its mean score, and how its gradients were caught."""
        rows = [
            (name, tuple(score.shape), float(score.mean()), self.fallback.get(name, "batched"))
            for name, score in self.items()
        ]
        return tabulate(rows, headers=("parameter", "shape", "mean score", "road"))
