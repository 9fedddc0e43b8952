"""The check of csrc/sparse_adam.cu: every byte that a step may write, against NumPy.

The oracle is written from the formula, in NumPy's fp32, whose every operation is correctly rounded
and so must give the same bits. What it lacks, a fused multiply-add and a rounding to bf16, is made
here from float64 and from the definition.
"""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule

# launch.h's ScatterTarget, AdamScalars, SparseAdamRow and AdamChunk.
TARGET = [("weight", "u8"), ("offsets", "u8"), ("storage", "i4"), ("wide", "i4")]
SCALARS = [
    *("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "decay", "negative_step_size"),
    *("bias_correction2_sqrt", "grad_scale", "grad_sign", "padding"),
]
STREAMS = ("grad", "values", "exp_avg", "exp_avg_sq")
ROW = np.dtype(
    [
        ("target", TARGET),
        *((name, "u8") for name in STREAMS),
        ("k", "i8"),
        ("scalars", [(name, "f4") for name in SCALARS]),
    ],
    align=True,
)
CHUNK = np.dtype([("start", "i8"), ("row", "i8")])
ENTRIES_PER_CHUNK = 1024

# One row each: entries, dtype of the weight (None: not masked), 64-bit offsets, beta1. The sizes
# are those at which a warp, a block's width and a chunk end.
ROWS = [
    (1, "fp32", False, 0.9),
    (33, "bf16", True, 0.9),
    (255, None, False, 0.9),
    (257, "fp16", False, 0.25),
    (1023, "bf16", False, 0.25),
    (1024, "fp32", True, 0.9),
    (2049, "fp16", True, 0.5),
]


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c of fp32 values, rounded once."""
    product = a.astype(np.float64) * b  # exact: 48 bits
    total = product + c
    # What the addition lost (Knuth's two-sum). If something, the last bit is set, so that the
    # second rounding, to fp32, cannot see a tie where there is none.
    other = total - product
    lost = (product - (total - other)) + (c - other)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    return np.where((lost != 0) & even, np.nextafter(total, towards), total).astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bf16 of each fp32 value, the even one of two."""
    low = values.view(np.uint32) >> 16  # towards zero
    candidates = [(bits << 16).astype(np.uint32).view(np.float32) for bits in (low, low + 1)]
    below, above = (np.abs(values.astype(np.float64) - candidate) for candidate in candidates)
    up = (above < below) | ((above == below) & (low % 2 == 1))
    return (low + up).astype(np.uint16)


def adam(s: np.void, grad, values, exp_avg, exp_avg_sq) -> tuple[np.ndarray, ...]:  # noqa: ANN001
    """Return values and both moments after one step of AdamW."""
    one = np.float32(1)
    grad = grad / s["grad_scale"] * s["grad_sign"]
    weight = s["one_minus_beta1"]
    if weight < 0.5:
        exp_avg = fused_multiply_add(weight, grad - exp_avg, exp_avg)
    else:  # torch's lerp counts from the nearer end
        exp_avg = fused_multiply_add(weight - one, grad - exp_avg, grad)
    decayed = exp_avg_sq * s["beta2"]
    exp_avg_sq = fused_multiply_add(s["one_minus_beta2"] * grad, grad, decayed)
    denominator = np.sqrt(exp_avg_sq) / s["bias_correction2_sqrt"] + s["eps"]
    step = s["negative_step_size"] * exp_avg / denominator
    return values * s["decay"] + step, exp_avg, exp_avg_sq


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Run one launch over rows of every kind and compare all arrays bit for bit."""
    rng = np.random.default_rng(schedule.seed)
    rows = np.zeros(len(ROWS), ROW)
    got, expected = [], []
    for row, (k, storage, wide, beta1) in zip(rows, ROWS, strict=True):
        streams = {name: rng.standard_normal(k).astype(np.float32) for name in STREAMS}
        streams["exp_avg_sq"] = np.abs(streams["exp_avg_sq"])
        row["k"] = k
        row["scalars"] = (1 - beta1, 0.999, 1e-3, 1e-8, 0.99, -0.01, 0.0447, 2.0, -1.0, 0.0)
        for name, stream in streams.items():
            row[name] = stream.ctypes.data
        after = adam(row["scalars"], *streams.values())
        got += streams.values()
        expected += [streams["grad"].copy(), *after]
        if storage is None:
            continue
        # Twice as many weights as entries, the last one masked: the array ends where they end.
        offsets = np.sort(rng.permutation(2 * k - 1)[:k])
        offsets[-1] = 2 * k - 1
        offsets = offsets.astype(np.int64 if wide else np.int32)
        bits = np.uint32 if storage == "fp32" else np.uint16
        weight = rng.integers(0, 2**15, 2 * k).astype(bits)
        rounded = {
            "fp32": lambda values: values.view(np.uint32),
            "bf16": to_bf16,
            "fp16": lambda values: values.astype(np.float16).view(np.uint16),
        }[storage](after[0])
        weight_after = weight.copy()
        weight_after[offsets] = rounded
        number = ("fp32", "bf16", "fp16").index(storage)
        row["target"] = (weight.ctypes.data, offsets.ctypes.data, number, wide)
        got += [weight, offsets]
        expected += [weight_after, offsets.copy()]

    starts = [
        (start, r) for r, row in enumerate(ROWS) for start in range(0, row[0], ENTRIES_PER_CHUNK)
    ]
    chunks = np.array(starts, CHUNK)
    arrays = (rows.view(np.uint8), chunks.view(np.uint8))
    lib.call("ff_sparse_adam", *arrays, 0)  # no chunk: no launch, nothing changes
    lib.call("ff_sparse_adam", *arrays, len(chunks))
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=f"array {number}")
