"""The check of csrc/topk_mask.cu: indices, counts and refusals against a stable sort in NumPy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from .library import SimtLibrary
from .schedules import Schedule

# launch.h's TopkRow and TopkParams; TopkResult is three int64 and then a count per tensor.
ROW = np.dtype(
    [("data", "u8"), ("numel", "i8"), ("storage", "i4"), ("padding", "i4"), ("first_tile", "i8")]
)
NUMBERS = ("num_tensors", "num_tiles", "scores_per_tile", "k", "stream_capacity", "max_blocks")
PARAMS = np.dtype(
    [
        ("rows", "u8"),
        *((name, "i8") for name in (*NUMBERS, "max_shared_bytes")),
        *((name, "u8") for name in ("workspace", "indices")),
        *((name, "i4") for name in ("wide_indices", "zero_bits")),
    ]
)
STORAGE = ("fp32", "bf16", "fp16")
NARROW = 40_000  # bytes of shared memory: the narrow digits


@dataclass(frozen=True)
class Case:
    """One call: tensors of (size, dtype), how their values are made, and the limits."""

    tensors: tuple[tuple[int, str], ...]
    values: str
    share: float  # of all scores that are selected; at least one is
    tile: int  # scores per tile
    stream: int  # scores that may be set aside
    max_blocks: int = 0
    shared_bytes: int = NARROW
    wide: bool = False
    bad: tuple[int, ...] = ()  # positions among all scores that are NaN or negative


MIXED = ((0, "fp32"), (500, "fp32"), (33, "bf16"), (1, "fp16"), (0, "bf16"), (800, "fp16"))
BF16 = ((1500, "bf16"), (1, "bf16"), (31, "bf16"))
TINY = tuple((2 * (i % 5 > 0), STORAGE[i % 3]) for i in range(26))
LONG = ((40_000, "fp32"),)
FULL = ((4096, "fp32"), (70_000, "fp32"))
# Nine, so that each meets all eight kinds of schedule in turn. Narrow digits, where not said: wide
# ones cost a block 32,768 words to clear.
CASES = (
    Case(MIXED, "random", 0.05, tile=40, stream=10_000),  # 35 tiles: a warp looks back twice
    Case(MIXED, "ties", 0.5, tile=129, stream=10_000, wide=True),
    Case(MIXED, "ties", 0.3, tile=257, stream=0, max_blocks=4),  # nothing is set aside
    Case(BF16, "random", 0.1, tile=300, stream=10_000, shared_bytes=0),  # one digit, no stream
    Case(LONG, "zeros", 0.4, tile=8192, stream=40_000),
    # The first and the last bad score are one thread's, where it has both tiles.
    Case(MIXED, "random", 0.2, tile=99, stream=10_000, bad=(1299, 104, 737)),
    Case(TINY, "ties", 1.0, tile=2, stream=100),  # the stream has as many tiles as the scores
    Case(MIXED, "one bin", 0.1, tile=600, stream=10_000, shared_bytes=0),
    # One block's counter comes to exactly half of its range within a turn, then past all of it.
    Case(FULL, "equal", 0.999, tile=8192, stream=0, max_blocks=1, shared_bytes=0),
)


def scores_of(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    """Make the tensors: fp32 and fp16 as such, bf16 as the upper halves of fp32."""
    tensors = []
    for size, dtype in case.tensors:
        values = {
            "random": lambda size: rng.lognormal(0, 3, size),
            "ties": lambda size: rng.integers(0, 4, size) / 4,
            "zeros": lambda size: np.where(rng.random(size) < 0.9, 0, rng.random(size)),
            # Its bin is even: what its counter borrows is missed by that of the next higher bin.
            "equal": lambda size: np.full(size, 0.696),
            "one bin": lambda size: 1 + rng.random(size) / 1000,
        }[case.values](size).astype(np.float32)
        if case.values != "equal":
            values[rng.random(size) < 0.01] = -0.0
            values[rng.random(size) < 0.005] = np.inf
        bits = values.view(np.uint32)
        if dtype == "bf16":
            tensors.append((bits >> 16).astype(np.uint16))
        else:
            with np.errstate(over="ignore"):
                tensors.append(values if dtype == "fp32" else values.astype(np.float16))
    for number, position in enumerate(case.bad):
        tensor, index = place_of(case, position)
        poison = np.float32(np.nan if number % 2 else -1)
        if case.tensors[tensor][1] == "bf16":
            tensors[tensor][index] = poison.view(np.uint32) >> 16
        else:
            tensors[tensor][index] = poison
    return tensors


def place_of(case: Case, position: int) -> tuple[int, int]:
    """Return tensor and index of a position among all scores."""
    ends = np.cumsum([size for size, _ in case.tensors])
    tensor = int(np.searchsorted(ends, position, side="right"))
    return tensor, position - int(ends[tensor] - case.tensors[tensor][0])


def values_of(tensor: np.ndarray) -> np.ndarray:
    """Return the scores as fp32."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32)


def run_case(lib: SimtLibrary, case: Case, seed: int) -> None:
    """Select once and compare."""
    tensors = scores_of(case, np.random.default_rng(seed))
    n = sum(tensor.size for tensor in tensors)
    k = max(1, int(case.share * n))
    rows = np.zeros(len(tensors), ROW)
    rows["data"] = [tensor.ctypes.data for tensor in tensors]
    rows["numel"] = [tensor.size for tensor in tensors]
    rows["storage"] = [STORAGE.index(dtype) for _, dtype in case.tensors]
    num_tiles = -(-rows["numel"] // case.tile)
    rows["first_tile"] = np.cumsum(num_tiles) - num_tiles
    indices = np.full(k, -1, np.int64 if case.wide else np.int32)
    params = np.zeros(1, PARAMS)
    params["rows"] = rows.ctypes.data
    for name, value in [
        ("num_tensors", len(tensors)),
        ("num_tiles", num_tiles.sum()),
        ("scores_per_tile", case.tile),
        ("k", k),
        ("stream_capacity", case.stream),
        ("max_blocks", case.max_blocks),
        ("max_shared_bytes", case.shared_bytes),
        ("wide_indices", case.wide),
        ("zero_bits", 16 if all(dtype == "bf16" for _, dtype in case.tensors) else 0),
        ("indices", indices.ctypes.data),
    ]:
        params[name] = value
    pointer = ctypes.c_void_p(params.ctypes.data)
    num_bytes = np.zeros(1, np.int64)
    lib.call("ff_topk_mask_workspace_bytes", pointer, num_bytes)
    workspace = np.full(int(num_bytes[0]) // 8, 0xA5A5A5A5A5A5A5A5, np.uint64)
    params["workspace"] = workspace.ctypes.data
    lib.call("ff_topk_mask", pointer)

    bad_tensor, bad_index, num_zero_score, *counts = workspace[: 3 + len(tensors)].view(np.int64)
    if case.bad:
        assert (bad_tensor, bad_index) == place_of(case, min(case.bad)), case
        return
    assert (bad_tensor, bad_index) == (-1, -1), case
    scores = np.concatenate([values_of(tensor) for tensor in tensors])
    chosen = np.sort(np.argsort(-scores, kind="stable")[:k])
    owner = np.repeat(np.arange(len(tensors)), rows["numel"])[chosen]
    starts = np.cumsum(rows["numel"]) - rows["numel"]
    np.testing.assert_array_equal(indices, chosen - starts[owner], err_msg=str(case))
    np.testing.assert_array_equal(counts, np.bincount(owner, minlength=len(tensors)))
    assert num_zero_score == np.count_nonzero(scores[chosen] == 0), case


def check(lib: SimtLibrary, schedule: Schedule) -> None:
    """Run one case, the next one under the next schedule."""
    run_case(lib, CASES[schedule.seed % len(CASES)], schedule.seed)
