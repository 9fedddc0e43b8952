"""The check of csrc/sparse_adam.cu: every byte that a step may write, against NumPy."""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule
from .step_rows import (
    LEARNING_RATE,
    ROWS_PER_PREPARE,
    Pair,
    fused_multiply_add,
    launch_and_compare,
    launch_capturable_and_compare,
    row_dtype,
    set_target,
)

# launch.h's AdamScalars, SparseAdamRow and AdamPlan.
SCALARS = [
    *("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "negative_step_size"),
    *("bias_correction2_sqrt", "grad_scale", "grad_sign", "l2_penalty"),
]
STREAMS = ("grad", "values", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
ROW = row_dtype(STREAMS, [(name, "f4") for name in SCALARS])
PLAN = np.dtype(
    [("step", "u8"), ("lr", LEARNING_RATE), *((n, "f8") for n in ("beta1", "beta2", "decay"))]
)

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


# One plan each, for the rows above in turn: steps so far, kind of learning rate, decoupled decay.
PLANS = [
    (0, "number", 0.1),
    (1, "fp32 on the device", 0.1),
    (2, "fp64 on the device", 0.0),
    (9, "fp32 on the host", 0.3),
    (99, "number", 0.0),
    (12_345, "fp32 on the device", 0.0),
    (2**24 - 1, "fp64 on the device", 0.1),
]


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Run one launch over rows of every kind and compare all arrays bit for bit, in both ways."""
    rng = np.random.default_rng(schedule.seed)
    rows, pairs = _rows(rng)
    launch_and_compare(lib, "ff_sparse_adam", rows, pairs)
    for fillers in (0, ROWS_PER_PREPARE) if schedule.seed % 4 == 0 else (0,):
        plans, steps, rates = _plans(fillers)
        rows, pairs = _rows(rng, plans, steps, rates)
        steps_after = steps + np.float32(1)
        launch_capturable_and_compare(
            lib, "ff_sparse_adam_capturable", rows, plans, [(steps, steps_after), *pairs]
        )
        if fillers:  # exactly as many rows as one launch prepares
            rows, plans = rows[:fillers].copy(), plans[:fillers]
            rows["grad"] = 1
            steps -= np.float32(1)
            launch_capturable_and_compare(lib, "ff_sparse_adam_capturable", rows, plans, [])


def _plans(fillers: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return plans, the last of them PLANS, the step counts and what else they point to."""
    plans = np.zeros(fillers + len(PLANS), PLAN)
    steps = np.array([3] * fillers + [step for step, _, _ in PLANS], np.float32)
    plans["step"] = steps.ctypes.data + 4 * np.arange(len(plans))
    plans["beta1"], plans["beta2"] = 0.9, 0.999
    plans["lr"]["value"] = 0.01
    held = []
    for plan, (_, kind, decay) in zip(plans[fillers:], PLANS, strict=True):
        in_float = "fp32" in kind
        rate = np.array([0.01], np.float32 if in_float else np.float64)
        address = rate.ctypes.data if "device" in kind else 0
        plan["lr"] = (address, np.nan if address else rate[0], in_float)
        plan["decay"] = decay
        held.append(rate)
    return plans, steps, held


def _planned(plan: np.void, step: np.float32, rate: np.ndarray) -> tuple[float, float, float]:
    """Return decay, negative_step_size and bias_correction2_sqrt, from Python's doubles."""
    count = int(step) + 1
    corrections = [1 - float(plan[name]) ** count for name in ("beta1", "beta2")]
    kind = rate.dtype.type  # with an fp32 learning rate each operation is rounded to fp32
    decay = kind(1) - kind(rate[0]) * kind(plan["decay"])
    return decay, -(kind(rate[0]) / kind(corrections[0])), corrections[1] ** 0.5


def _rows(
    rng: np.random.Generator,
    plans: np.ndarray | None = None,
    steps: np.ndarray | None = None,
    rates: list[np.ndarray] | None = None,
) -> tuple[np.ndarray, list[Pair]]:
    """Return rows of every kind, and before them empty ones, one per plan; and what they become."""
    fillers = 0 if plans is None else len(plans) - len(ROWS)
    rows = np.zeros(fillers + len(ROWS), ROW)
    constant = (1 - 0.9, 0.999, 1e-3, 1e-8)
    rows["scalars"] = (*constant, 0.99, -0.01, 0.0447, 2.0, -1.0, 0.0)
    if fillers:
        filler = _planned(plans[0], steps[0], np.array([0.01]))
        rows["scalars"][:fillers] = (*constant, *filler, 2.0, -1.0, 0.0)
    pairs: list[Pair] = []
    for number, (k, storage, wide, beta1, amsgrad, l2) in enumerate(ROWS):
        row = rows[fillers + number]
        streams = {name: rng.standard_normal(k).astype(np.float32) for name in STREAMS}
        streams["exp_avg_sq"] = np.abs(streams["exp_avg_sq"])
        streams["max_exp_avg_sq"] = np.abs(streams["max_exp_avg_sq"])
        if not amsgrad:
            del streams["max_exp_avg_sq"]
        row["k"] = k
        row["scalars"]["one_minus_beta1"], row["scalars"]["l2_penalty"] = 1 - beta1, l2
        if plans is not None:
            at = fillers + number
            plans[at]["beta1"] = beta1
            planned = _planned(plans[at], steps[at], rates[number])
            for name, value in zip(SCALARS[4:7], planned, strict=True):
                row["scalars"][name] = value
        for name, stream in streams.items():
            row[name] = stream.ctypes.data
        after = adam(row["scalars"], *(streams.get(name) for name in STREAMS))
        expected = (streams["grad"].copy(), *after)  # nothing after the last without amsgrad
        pairs += [(s, e) for s, e in zip(streams.values(), expected, strict=False) if e is not None]
        if storage is not None:
            pairs += set_target(row, storage, wide, after[0], rng)
    return rows, pairs
