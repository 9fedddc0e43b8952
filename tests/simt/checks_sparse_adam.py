"""The check of csrc/sparse_adam.cu: every byte that a step may write, against NumPy."""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule
from .step_rows import Pair, fused_multiply_add, launch_and_compare, row_dtype, set_target

# launch.h's AdamScalars and SparseAdamRow.
SCALARS = [
    *("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "negative_step_size"),
    *("bias_correction2_sqrt", "grad_scale", "grad_sign", "l2_penalty"),
]
STREAMS = ("grad", "values", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
ROW = row_dtype(STREAMS, [(name, "f4") for name in SCALARS])

# One row each: entries, dtype of the weight (None: not masked), 64-bit offsets, beta1, amsgrad, L2
# penalty. The sizes are those at which a warp, a block's width and a chunk end.
ROWS = [
    (1, "fp32", False, 0.9, False, 0.0),
    (33, "bf16", True, 0.9, True, 0.0),
    (255, None, False, 0.9, False, 0.3),
    (257, "fp16", False, 0.25, False, 0.0),
    (1023, "bf16", False, 0.25, True, 0.3),
    (1024, "fp32", True, 0.9, True, 0.0),
    (2049, "fp16", True, 0.5, False, 0.3),
]


def adam(
    s: np.void,
    grad: np.ndarray,
    values: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    max_exp_avg_sq: np.ndarray | None,
) -> tuple[np.ndarray | None, ...]:
    """Return values, both moments and the largest second one after one step of Adam or AdamW."""
    one = np.float32(1)
    grad = grad / s["grad_scale"] * s["grad_sign"]
    if s["l2_penalty"]:
        grad = fused_multiply_add(s["l2_penalty"], values, grad)
    weight = s["one_minus_beta1"]
    if weight < 0.5:
        exp_avg = fused_multiply_add(weight, grad - exp_avg, exp_avg)
    else:  # torch's lerp counts from the nearer end
        exp_avg = fused_multiply_add(weight - one, grad - exp_avg, grad)
    decayed = exp_avg_sq * s["beta2"]
    second = exp_avg_sq = fused_multiply_add(s["one_minus_beta2"] * grad, grad, decayed)
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq = np.maximum(max_exp_avg_sq, exp_avg_sq)
    denominator = np.sqrt(second) / s["bias_correction2_sqrt"] + s["eps"]
    step = s["negative_step_size"] * exp_avg / denominator
    return values * s["decay"] + step, exp_avg, exp_avg_sq, max_exp_avg_sq


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Run one launch over rows of every kind and compare all arrays bit for bit."""
    rng = np.random.default_rng(schedule.seed)
    rows = np.zeros(len(ROWS), ROW)
    pairs: list[Pair] = []
    for row, (k, storage, wide, beta1, amsgrad, l2) in zip(rows, ROWS, strict=True):
        streams = {name: rng.standard_normal(k).astype(np.float32) for name in STREAMS}
        streams["exp_avg_sq"] = np.abs(streams["exp_avg_sq"])
        streams["max_exp_avg_sq"] = np.abs(streams["max_exp_avg_sq"])
        if not amsgrad:
            del streams["max_exp_avg_sq"]
        row["k"] = k
        row["scalars"] = (1 - beta1, 0.999, 1e-3, 1e-8, 0.99, -0.01, 0.0447, 2.0, -1.0, l2)
        for name, stream in streams.items():
            row[name] = stream.ctypes.data
        after = adam(row["scalars"], *(streams.get(name) for name in STREAMS))
        expected = (streams["grad"].copy(), *after)  # nothing after the last without amsgrad
        pairs += [(s, e) for s, e in zip(streams.values(), expected, strict=False) if e is not None]
        if storage is not None:
            pairs += set_target(row, storage, wide, after[0], rng)
    launch_and_compare(lib, "ff_sparse_adam", rows, pairs)
