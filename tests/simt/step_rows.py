"""What the checks of the optimizer kernels share: tables of rows, and arithmetic rounded once.

The oracles are written from the formulas, in NumPy's fp32, whose every operation is correctly
rounded and so must give the same bits. What it lacks, a fused multiply-add and a rounding to bf16,
is made here from float64 and from the definition.
"""

from __future__ import annotations

import numpy as np

from .library import SimtLibrary

# launch.h's ScatterTarget and StepChunk.
TARGET = [("weight", "u8"), ("offsets", "u8"), ("storage", "i4"), ("wide", "i4")]
CHUNK = np.dtype([("start", "i8"), ("row", "i8")])
ENTRIES_PER_CHUNK = 1024

# launch.h's LearningRate, and how many rows one launch of capturable.cuh prepares.
LEARNING_RATE = [("tensor", "u8"), ("value", "f8"), ("in_float", "i8")]
ROWS_PER_PREPARE = 480
UNSET = 77  # stands where a launch has not written yet

Pair = tuple[np.ndarray, np.ndarray]  # an array that the kernel sees, and what it must hold after


def row_dtype(streams: tuple[str, ...], scalars: list[tuple[str, str]]) -> np.dtype:
    """Return the record of launch.h's rows: a target, addresses of streams, k and scalars."""
    pointers = [(name, "u8") for name in streams]
    return np.dtype([("target", TARGET), *pointers, ("k", "i8"), ("scalars", scalars)], align=True)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c of fp32 values, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 48 bits
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


def set_target(
    row: np.void, storage: str, wide: bool, values: np.ndarray, rng: np.random.Generator
) -> list[Pair]:
    """Give a row a weight of twice as many elements as it has entries.

    Args:
        row: the record.
        storage: "fp32", "bf16" or "fp16".
        wide: 64-bit offsets.
        values: [k] what the kernel is to round and write.
        rng: makes the weight and the offsets.

    Returns:
        The weight and the offsets.
    """
    k = values.size
    # The last element is masked: the array ends where the entries end.
    offsets = np.sort(rng.permutation(2 * k - 1)[:k])
    offsets[-1] = 2 * k - 1
    offsets = offsets.astype(np.int64 if wide else np.int32)
    weight = rng.integers(0, 2**15, 2 * k).astype(np.uint32 if storage == "fp32" else np.uint16)
    weight_after = weight.copy()
    weight_after[offsets] = {
        "fp32": lambda: values.view(np.uint32),
        "bf16": lambda: to_bf16(values),
        "fp16": lambda: values.astype(np.float16).view(np.uint16),
    }[storage]()
    number = ("fp32", "bf16", "fp16").index(storage)
    row["target"] = (weight.ctypes.data, offsets.ctypes.data, number, wide)
    return [(weight, weight_after), (offsets, offsets.copy())]


def launch_and_compare(
    lib: SimtLibrary, function: str, rows: np.ndarray, pairs: list[Pair]
) -> None:
    """Run one launch over all rows and compare all arrays bit for bit."""
    chunks = _chunks(rows)
    arrays = (rows.view(np.uint8), chunks.view(np.uint8))
    lib.call(function, *arrays, 0)  # no chunk: no launch, nothing changes
    lib.call(function, *arrays, len(chunks))
    _compare(pairs)


def launch_capturable_and_compare(
    lib: SimtLibrary, function: str, rows: np.ndarray, plans: np.ndarray, pairs: list[Pair]
) -> None:
    """Run one capturable launch, in which everything that varies is read from memory.

    Args:
        lib: the library.
        function: its function.
        rows: one per plan, complete; what the launch has to fill in is taken out before it.
        plans: their plans.
        pairs: what the launch changes besides the rows.
    """
    grads, chunks, blank = rows["grad"].copy(), _chunks(rows), rows.copy()
    found_inf, grad_scale = np.zeros(1, np.float32), rows["scalars"]["grad_scale"][:1].copy()
    blank["grad"] = 0
    for name in _VARYING & set(rows["scalars"].dtype.names):
        blank["scalars"][name] = UNSET
    # One row more, which belongs to no launch.
    table = np.concatenate([blank, np.zeros(1, rows.dtype)])
    arrays = table.view(np.uint8), plans.view(np.uint8), len(plans), grads
    sizes = chunks.view(np.uint8), len(chunks)
    for overflow in (1.0, np.nan):
        before = [got.copy() for got, _ in pairs]
        found_inf[:] = overflow
        lib.call(function, *arrays, found_inf, grad_scale, *sizes)
        _compare([*zip((got for got, _ in pairs), before, strict=True), (table[:-1], blank)])
    found_inf[:] = 0
    lib.call(function, *arrays, found_inf, grad_scale, *sizes)
    _compare([*pairs, (table[:-1], rows), (table[-1:], np.zeros(1, rows.dtype))])


# The scalars that a capturable launch computes, of both optimizers.
_VARYING = {"decay", "negative_step_size", "bias_correction2_sqrt"} | {
    "negative_lr", "first_step", "grad_scale"
}  # fmt: skip


def _chunks(rows: np.ndarray) -> np.ndarray:
    starts = [
        (start, r) for r, k in enumerate(rows["k"]) for start in range(0, k, ENTRIES_PER_CHUNK)
    ]
    return np.array(starts, CHUNK)


def _compare(pairs: list[Pair]) -> None:
    for number, (got, expected) in enumerate(pairs):
        np.testing.assert_array_equal(
            got.view(np.uint8), expected.view(np.uint8), err_msg=f"array {number}"
        )
