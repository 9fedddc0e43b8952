"""What scoring costs: passes and seconds of each phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from fishfast.fisher.score_files import WORK

__all__ = ["Costs"]


class Costs:
    """Counts passes and the time that they take.

    Attributes:
        passes: how many forward and backward passes each phase took.
        seconds: how long each phase took, by the wall clock.
    """

    def __init__(self) -> None:
        self.passes = dict.fromkeys(WORK, 0)
        self.seconds = dict.fromkeys(WORK, 0.0)

    @contextlib.contextmanager
    def of(self, phase: str, passes: int = 0) -> Iterator[None]:
        """Take the time of what runs inside, and count its passes."""
        self.passes[phase] += passes
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
