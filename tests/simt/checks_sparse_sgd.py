"""The check of csrc/sparse_sgd.cu: every byte that a step may write, against NumPy."""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule
from .step_rows import Pair, fused_multiply_add, launch_and_compare, row_dtype, set_target

# launch.h's SgdScalars and SparseSgdRow.
SCALARS = [
    *((name, "f4") for name in ("negative_lr", "momentum", "one_minus_dampening", "weight_decay")),
    *((name, "f4") for name in ("grad_scale", "grad_sign")),
    *((name, "i4") for name in ("nesterov", "first_step")),
]
STREAMS = ("grad", "values", "momentum_buffer")
ROW = row_dtype(STREAMS, SCALARS)

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
    """Run one launch over rows of every kind and compare all arrays bit for bit."""
    rng = np.random.default_rng(schedule.seed)
    rows = np.zeros(len(ROWS), ROW)
    pairs: list[Pair] = []
    for row, (k, storage, wide, momentum, decay, nesterov, first) in zip(rows, ROWS, strict=True):
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
    launch_and_compare(lib, "ff_sparse_sgd", rows, pairs)
