"""The check of csrc/sparse_sgd.cu: every byte that a step may write, against NumPy."""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule
from .step_rows import (
    LEARNING_RATE,
    ROWS_PER_PREPARE,
    UNSET,
    Pair,
    fused_multiply_add,
    launch_and_compare,
    launch_capturable_and_compare,
    row_dtype,
    set_target,
)

# launch.h's SgdScalars, SparseSgdRow and SgdPlan.
SCALARS = [
    *((name, "f4") for name in ("negative_lr", "momentum", "one_minus_dampening", "weight_decay")),
    *((name, "f4") for name in ("grad_scale", "grad_sign")),
    *((name, "i4") for name in ("nesterov", "first_step")),
]
STREAMS = ("grad", "values", "momentum_buffer")
ROW = row_dtype(STREAMS, SCALARS)
PLAN = np.dtype([("step", "u8"), ("lr", LEARNING_RATE)])

# One row each: entries, dtype of the weight (None: not masked), 64-bit offsets, momentum (None: no
# buffer), weight decay, nesterov, first step. The sizes are those at which a warp, a block's width
# and a chunk end.
ROWS = [
    (1, "fp32", False, 0.9, 0.0, False, False),
    (33, "bf16", True, 0.9, 0.1, False, True),
    (255, None, False, None, 0.0, False, False),
    (257, "fp16", False, 0.7, 0.0, True, False),
    (1023, "bf16", False, None, 0.1, False, False),
    (1024, "fp32", True, 0.9, 0.1, True, True),
    (2049, "fp16", True, 0.9, 0.1, False, False),
]


def sgd(
    s: np.void, grad: np.ndarray, values: np.ndarray, buffer: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return values and momentum after one step of SGD."""
    grad = grad / s["grad_scale"] * s["grad_sign"]
    if s["weight_decay"]:
        grad = fused_multiply_add(values, s["weight_decay"], grad)
    if buffer is not None:
        if s["first_step"]:
            buffer = grad
        else:
            buffer = fused_multiply_add(grad, s["one_minus_dampening"], buffer * s["momentum"])
        grad = fused_multiply_add(buffer, s["momentum"], grad) if s["nesterov"] else buffer
    return fused_multiply_add(grad, s["negative_lr"], values), buffer


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Run one launch over rows of every kind and compare all arrays bit for bit, in both ways."""
    rng = np.random.default_rng(schedule.seed)
    rows, pairs = _rows(rng)
    launch_and_compare(lib, "ff_sparse_sgd", rows, pairs)
    # Also more rows than one launch prepares.
    for fillers in (0, ROWS_PER_PREPARE) if schedule.seed % 4 == 0 else (0,):
        rows, pairs = _rows(rng, fillers)
        plans = np.zeros(len(rows), PLAN)
        # Without momentum no step is counted; a first step is one that comes after none.
        with_momentum, first = rows["momentum_buffer"] != 0, rows["scalars"]["first_step"] != 0
        rows["scalars"]["first_step"] = np.where(with_momentum, first, UNSET)
        steps = np.where(first, 0, 1 + np.arange(len(rows))).astype(np.float32)
        plans["step"] = np.where(with_momentum, steps.ctypes.data + 4 * np.arange(len(rows)), 0)
        rates = np.full(len(rows), 0.1), np.full(len(rows), 0.1, np.float32)
        for number, plan in enumerate(plans):  # on the device in fp64 and fp32, a number
            kind = number % 3
            address = rates[kind].ctypes.data + rates[kind].itemsize * number if kind < 2 else 0
            plan["lr"] = (address, np.nan if address else 0.1, kind == 1)
        steps_after = steps + with_momentum.astype(np.float32)
        launch_capturable_and_compare(
            lib, "ff_sparse_sgd_capturable", rows, plans, [(steps, steps_after), *pairs]
        )


def _rows(rng: np.random.Generator, fillers: int = 0) -> tuple[np.ndarray, list[Pair]]:
    """Return rows of every kind, and before them empty ones; and what they become."""
    rows = np.zeros(fillers + len(ROWS), ROW)
    rows["scalars"] = (-0.1, 0.0, 0.75, 0.0, 2.0, -1.0, 0, 0)
    pairs: list[Pair] = []
    for row, (k, storage, wide, momentum, decay, nesterov, first) in zip(
        rows[fillers:], ROWS, strict=True
    ):
        grad, values, buffer = (rng.standard_normal(k).astype(np.float32) for _ in STREAMS)
        row["k"] = k
        row["scalars"] = (-0.1, momentum or 0.0, 0.75, decay, 2.0, -1.0, nesterov, first)
        row["grad"], row["values"] = grad.ctypes.data, values.ctypes.data
        if momentum is not None:
            row["momentum_buffer"] = buffer.ctypes.data
        after, buffer_after = sgd(
            row["scalars"], grad, values, None if momentum is None else buffer
        )
        pairs += [(grad, grad.copy()), (values, after)]
        if buffer_after is not None:
            pairs.append((buffer, buffer_after))
        if storage is not None:
            pairs += set_target(row, storage, wide, after, rng)
    return rows, pairs
