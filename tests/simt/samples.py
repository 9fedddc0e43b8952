"""Run the kernels of samples.cu and judge them by NumPy.

By hand, under any schedule and sanitizer::

    python tests/simt/run.py tsan -m simt.samples LIBRARY.so 24     (in tests/)
    python tests/simt/run.py asan -m simt.samples LIBRARY.so --bug shared_overrun
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import Callable

import numpy as np

from .library import SimtLibrary
from .schedules import schedules

TILE = 256  # kThreads of samples.cu


class Omit(enum.IntEnum):
    """Which line of a correct kernel is left out; the same as in samples.h."""

    NOTHING = 0
    BARRIER = 1
    FENCE = 2
    TILE_COUNTER = 3
    SYNC_WARP = 4


def uint32s(seed: int, size: int) -> np.ndarray:
    """Return random 32-bit unsigned integers."""
    return np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)


def warp_table(lib: SimtLibrary, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the results of all warp collectives, and what they must be."""
    delta = seed % 32
    values = np.random.default_rng(seed).integers(-9, 9, 32, dtype=np.int32)
    out = np.zeros((16, 32), np.uint32)
    lib.call("ff_warp_table", values, out, delta)

    bits, lane = values.view(np.uint32), np.arange(32)
    group = lane // 8 * 8
    up, down = lane - delta, lane + delta
    rows = [
        bits[(lane * 7 + delta) % 32],
        bits[np.where(up < 0, lane, up)],
        bits[np.where(down > 31, lane, down)],
        bits[lane ^ delta],
        bits[np.where(up < group, lane, up)],
        bits[np.where(down >= group + 8, lane, down)],
        np.sum((values & 1).astype(np.uint64) << lane.astype(np.uint64)),
        np.all(values >= 0),
        np.any(values < 0),
        np.sum(bits, dtype=np.uint32),
        values.min().astype(np.int32).view(np.uint32),
        values.max().astype(np.int32).view(np.uint32),
        np.bitwise_and.reduce(bits),
        np.bitwise_or.reduce(bits),
        [np.sum((bits == b).astype(np.uint64) << lane.astype(np.uint64)) for b in bits],
        np.where(lane < 16, np.sum(bits[:16], dtype=np.uint32), bits[16:].max()),
    ]
    expected = np.stack([np.broadcast_to(np.asarray(row, np.uint32), 32) for row in rows])
    return out, expected


def swap_neighbours(
    lib: SimtLibrary, seed: int, omit: Omit = Omit.NOTHING
) -> tuple[np.ndarray, np.ndarray]:
    """Return each value's neighbour, exchanged through shared memory, and what it must be."""
    values, out = uint32s(seed, 32), np.zeros(32, np.uint32)
    lib.call("ff_swap_neighbours", values, out, omit)
    return out, values[np.arange(32) ^ 1]


def atomics(lib: SimtLibrary, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what every kind of atomic left behind, and what it must be."""
    values = uint32s(seed, 700)
    counters = np.zeros(9, np.uint32)
    counters[[2, 4]] = 2**32 - 1  # the neutral elements of min and and
    float_sum, sum64 = np.zeros(1, np.float32), np.zeros(1, np.uint64)
    lib.call("ff_atomics", values, values.size, counters, float_sum, sum64)

    out = np.concatenate([counters, float_sum, sum64 >> np.uint64(32)]).astype(np.uint64)
    expected = [
        np.sum(values, dtype=np.uint32),
        2**32 - values.size,
        values.min(),
        values.max(),
        np.bitwise_and.reduce(values),
        np.bitwise_or.reduce(values),
        np.bitwise_xor.reduce(values),
        values.size,
        0,
        values.size // 2,
        np.sum(values, dtype=np.uint32),
    ]
    return out, np.array(expected, np.uint64)


def block_scan(
    lib: SimtLibrary, seed: int, omit: Omit = Omit.NOTHING, size: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Return the exclusive sums inside each tile, and what they must be."""
    values = uint32s(seed, size)
    out = np.zeros_like(values)
    lib.call("ff_block_scan", values, out, size, omit)

    tiles = [values[start : start + TILE] for start in range(0, size, TILE)]
    sums = [np.cumsum(tile, dtype=np.uint32) - tile for tile in tiles]
    return out, np.concatenate(sums)


def compact(
    lib: SimtLibrary, seed: int, omit: Omit = Omit.NOTHING, size: int = 3001
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of positive entries by decoupled look-back, and what they must be."""
    values = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    expected = np.flatnonzero(values > 0).astype(np.int32)
    out = np.full(expected.size, -1, np.int32)
    status = np.zeros(-(-size // TILE), np.uint64)
    lib.call("ff_compact", values, size, out, status, np.zeros(1, np.uint32), omit)
    return out, expected


def grid_sum(
    lib: SimtLibrary, seed: int, omit: Omit = Omit.NOTHING, size: int = 3001
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of a grid by its last block, and what it must be."""
    values = uint32s(seed, size)
    total = np.zeros(1, np.uint32)
    partial_sums = np.zeros(-(-size // TILE), np.uint32)
    lib.call("ff_grid_sum", values, size, partial_sums, np.zeros(1, np.uint32), total, omit)
    return total, np.array([np.sum(values, dtype=np.uint32)])


SAMPLES: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "warp_table": warp_table,
    "swap_neighbours": swap_neighbours,
    "atomics": atomics,
    "block_scan": block_scan,
    "compact": compact,
    "grid_sum": grid_sum,
}


def check_all(lib: SimtLibrary, num_schedules: int) -> int:
    """Run every correct sample under every schedule.

    Returns:
        The number of runs.

    Raises:
        AssertionError: If a result is wrong.
    """
    for schedule in schedules(num_schedules):
        schedule.apply(lib)
        for name, sample in SAMPLES.items():
            got, expected = sample(lib, schedule.seed)
            np.testing.assert_array_equal(got, expected, err_msg=f"{name}, {schedule}")
    return num_schedules * len(SAMPLES)


def main() -> None:
    """Run all samples, or one bug, and say so on stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("schedules", nargs="?", type=int, default=1)
    parser.add_argument("--bug", help="a kernel of planted_bugs.cu")
    parser.add_argument("--sample", choices=SAMPLES, help="with --omit: one sample without a line")
    parser.add_argument("--omit", type=lambda name: Omit[name.upper()], default=Omit.NOTHING)
    arguments = parser.parse_args()
    lib = SimtLibrary(arguments.library)
    if arguments.bug:
        lib.schedule(resident_blocks=2)
        # 64 elements; the array ends where they end.
        lib.call("ff_planted_bug", arguments.bug, np.zeros(64, np.int32), 64)
    elif arguments.sample:
        for schedule in schedules(arguments.schedules):
            schedule.apply(lib)
            SAMPLES[arguments.sample](lib, schedule.seed, arguments.omit)
    else:
        print(f"{check_all(lib, arguments.schedules)} runs are right")


if __name__ == "__main__":
    main()
