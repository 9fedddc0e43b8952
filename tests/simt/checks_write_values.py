"""The check of csrc/write_values.cu: every byte that it may write, against NumPy."""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule
from .step_rows import TARGET, Pair, launch_and_compare, set_target

# launch.h's WriteRow.
ROW = np.dtype([("target", TARGET), ("values", "u8"), ("k", "i8")], align=True)

# One row each: entries, dtype of the weight, 64-bit offsets. The sizes are those at which a warp, a
# block's width and a chunk end.
ROWS = [
    (1, "fp32", False), (33, "bf16", True), (255, "fp16", False), (257, "fp32", True),
    (1023, "bf16", False), (1024, "fp16", True), (2049, "bf16", False),
]  # fmt: skip


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Run one launch over rows of every kind and compare all arrays bit for bit."""
    rng = np.random.default_rng(schedule.seed)
    rows = np.zeros(len(ROWS), ROW)
    pairs: list[Pair] = []
    for row, (k, storage, wide) in zip(rows, ROWS, strict=True):
        values = rng.standard_normal(k).astype(np.float32)
        row["values"], row["k"] = values.ctypes.data, k
        pairs += [(values, values.copy()), *set_target(row, storage, wide, values, rng)]
    launch_and_compare(lib, "ff_write_values", rows, pairs)
