"""Mutants of the shipped kernels that no run can tell from the original, each with the reason.

mutate.py expects them to survive: it complains when one is caught, and when an entry fits no
mutant or more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .mutants import Mutant


@dataclass(frozen=True)
class Equivalent:
    """One mutant that need not be caught."""

    file: str
    edit: str  # as mutate.py --list shows it
    near: str  # code on its line or a neighbouring one, which tells it from others
    reason: str

    def fits(self, mutant: Mutant) -> bool:
        """Whether this is the mutant meant."""
        return (self.file, self.edit) == (mutant.file, mutant.edit) and self.near in mutant.context


EQUIVALENT: tuple[Equivalent, ...] = ()
