"""What scores must have in common to be added: over calls, files and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["FISHER_TYPES", "ScoreKind"]

FISHER_TYPES = ("empirical", "sampled", "exact")


class ScoreKind(NamedTuple):
    """What is summed, and for which parameters.

    Attributes:
        fisher_type: one of `FISHER_TYPES`.
        power: 2 or 1.
        shapes: name -> shape.
    """

    fisher_type: str
    power: int
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, scores: Mapping[str, Tensor], fisher_type: str, power: int) -> ScoreKind:
        """Return the kind of some scores."""
        shapes = {name: tuple(score.shape) for name, score in scores.items()}
        return cls(fisher_type, power, shapes)

    def difference(self, other: ScoreKind, here: str, there: str) -> str:
        """Name the first difference, in words; the order of the parameters is none.

        Args:
            other: another kind.
            here: where this kind is, such as "on rank 0".
            there: where the other is.

        Returns:
            The difference, or "" if there is none.
        """
        for what in ("fisher_type", "power"):
            mine, its = getattr(self, what), getattr(other, what)
            if mine != its:
                return f"{what} is {mine!r} {here} and {its!r} {there}"
        for name in [*self.shapes, *other.shapes]:
            if name not in self.shapes or name not in other.shapes:
                return f"{name!r} is scored {here if name in self.shapes else there} only"
            if self.shapes[name] != other.shapes[name]:
                return (
                    f"{name!r} has shape {self.shapes[name]} {here} and {other.shapes[name]} "
                    f"{there}"
                )
        return ""
