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


_WORD_IS_ALL = (
    "The flag's word is all that is handed over: the sum beside its two state bits. What the other "
    "block wrote before is never read through it, so nothing needs the order. Acquire and release "
    "all the same: csrc/ has no other kind of flag."
)

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent("sparse_adam.h", ">= -> >", "adam_maximum", "Of two equal moments either will do."),
    Equivalent(
        "ordered_scan.cuh",
        "st_release -> mutants::relaxed_store",
        "kOwnSum | own",
        _WORD_IS_ALL,
    ),
    Equivalent(
        "ordered_scan.cuh",
        "st_release -> mutants::relaxed_store",
        "kPrefixSum | (before + own)",
        _WORD_IS_ALL,
    ),
    Equivalent(
        "ordered_scan.cuh",
        "ld_acquire -> mutants::relaxed_load",
        "other >= 0",
        _WORD_IS_ALL,
    ),
)
