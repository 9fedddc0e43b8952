"""The orders in which CI runs the threads of every shipped kernel.

::

    for schedule in schedules(NUM_SCHEDULES["plain"]):
        schedule.apply(lib)
        lib.call("ff_scale", x, x.size, 0.5)
"""

from __future__ import annotations

from dataclasses import dataclass

from .library import SimtLibrary

# How many orders every shipped kernel runs under in CI, by the mode of build.py.
NUM_SCHEDULES = {"plain": 200, "asan": 24, "tsan": 24}


@dataclass(frozen=True)
class Schedule:
    """One order: the arguments of `SimtLibrary.schedule`."""

    seed: int
    resident_blocks: int
    reverse: bool

    def apply(self, lib: SimtLibrary) -> None:
        """Run the next launches in this order."""
        lib.schedule(seed=self.seed, resident_blocks=self.resident_blocks, reverse=self.reverse)


def schedules(count: int) -> list[Schedule]:
    """Return `count` orders, each of them another one.

    The first is in order, block after block. The others are seeded; they have 1 to 4 blocks
    interleaved and, in groups of four, the grid from its first block or from its last: eight in a
    row show every combination.
    """
    return [Schedule(seed, 1 + seed % 4, seed // 4 % 2 == 1) for seed in range(count)]
