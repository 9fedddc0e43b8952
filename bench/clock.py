"""The clock of each device: events on a GPU with a cold L2, perf_counter on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import full_size, short_set

__all__ = ["compare"]

_WARMUP, _REPEATS = 3, 60
_FEWEST_REPEATS = 3  # of a case that is slow
_FLUSH_BYTES = 2**28  # several times the L2 of any card


def compare(
    run: Callable[[], Any], floor: Callable[[], Any], device: torch.device,
    seconds: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Time ``run`` and its floor in turns on their device's clock, and take each turn's ratio.

    Args:
        run: what is timed; inputs are built before.
        floor: what it is held against, on the same inputs.
        device: where both run.
        seconds: about how long to measure, beyond the fewest repeats; default 1; 0.4 where minutes
            count, 0.02 at toy size.

    Returns:
        ``median_us`` of ``run`` and ``times_floor`` of the turns' ratios, each with ``_p20`` and
        ``_p80``, and the median ``floor_us``.
    """
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    repeats = _warm_up([floor, run], clock, seconds)
    turns = [(clock(floor), clock(run)) for _ in range(repeats)]
    p20, median, p80 = _quintiles([time for _, time in turns])
    ratio_p20, ratio, ratio_p80 = _quintiles([time / own_floor for own_floor, time in turns])
    return {
        "median_us": median, "p20_us": p20, "p80_us": p80,
        "floor_us": statistics.median(own_floor for own_floor, _ in turns),
        "times_floor": ratio, "times_floor_p20": ratio_p20, "times_floor_p80": ratio_p80,
    }  # fmt: skip


def _warm_up(
    runs: list[Callable[[], Any]], clock: Callable[..., float], seconds: float | None
) -> int:
    """Run each a few times, and return how many repeats fit into the time.

    The first run may compile; what took long even so is warm by now.
    """
    if seconds is None:
        seconds = _seconds()
    first = sum(clock(run) for run in runs)
    if first > 2e6:
        return max(_FEWEST_REPEATS, min(int(1e6 * seconds / first), _REPEATS))
    times = [sum(clock(run) for run in runs) for _ in range(_WARMUP - 1)]
    return max(_FEWEST_REPEATS, min(int(1e6 * seconds / min(times)), _REPEATS))


def _seconds() -> float:
    return (0.4 if short_set() else 1.0) if full_size() else 0.02


def _quintiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, the median and p80."""
    found = statistics.quantiles(values, n=5, method="inclusive")
    return found[0], statistics.median(values), found[-1]


def _time_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)


def _time_cuda(run: Callable[[], Any]) -> float:
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()  # cold L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)
