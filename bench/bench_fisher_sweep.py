"""What the Fisher costs as samples get longer and batches larger: time and memory.

A few batches of a small BERT, T against a fixed B and B against a fixed T, beside the floor, the
batch-1 loop, and torch.func's vmap, which keeps B gradients of every weight. Same check, floor and
columns as bench_fisher.py.

    FISHFAST_BENCH=full python -m pytest bench/bench_fisher_sweep.py -s --benchmark-enable
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bench_fisher import score_and_record
from fisher_baselines import FLOOR
from fisher_models import load
from harness import devices, full_size, short_set

# Two sweeps: which size grows, over what, and the other one's fixed value.
_TOY: dict[str, tuple[list[int], int]] = {"length": ([4, 8], 2), "batch": ([2, 3], 4)}
_CPU: dict[str, tuple[list[int], int]] = {
    "length": ([1, 8, 64, 256] if short_set() else [1, 4, 16, 64, 256, 1024], 2),
    "batch": ([1, 4, 16] if short_set() else [1, 2, 4, 8, 16, 32, 64, 128], 32),
}
_GPU: dict[str, tuple[list[int], int]] = {
    "length": ([1, 16, 128, 1024, 4096] if short_set() else [4**i for i in range(7)], 8),
    "batch": ([1, 8, 64, 256] if short_set() else [2**i for i in range(10)], 128),
}
_MODEL = {
    "toy": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 50},
    "cpu": {"layers": 2, "hidden": 256, "heads": 4, "vocab": 1000},
    "gpu": {"layers": 4, "hidden": 1024, "heads": 16, "vocab": 30522},
}
_SECONDS = (0.5 if short_set() else 2.0) if full_size() else 0.1
_KIND = ("gpu" if torch.cuda.is_available() else "cpu") if full_size() else "toy"


def _cases() -> list[tuple[int, int]]:
    """Return every T and B; the sweeps may cross."""
    sweeps = {"toy": _TOY, "cpu": _CPU, "gpu": _GPU}[_KIND]
    lengths, batch = sweeps["length"]
    batches, length = sweeps["batch"]
    by_length, by_batch = [(t, batch) for t in lengths], [(length, b) for b in batches]
    # In turns: where time runs out both have some.
    turns = itertools.zip_longest(by_length, by_batch)
    return list(dict.fromkeys(case for turn in turns for case in turn if case is not None))


@pytest.mark.parametrize("contender", [FLOOR, "fishfast", "batch-1 loop", "torch.func vmap"])
@pytest.mark.parametrize(("length", "batch"), _cases(), ids=lambda value: f"{value}")
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_sweep(
    benchmark: Any, contender: str, length: int, batch: int, device: torch.device
) -> None:
    """Time one way to score."""
    pytest.importorskip("transformers", reason="the BERT is that of transformers: not installed")
    sizes = {"length": length, "batch_size": batch, "batches": 6}
    workload = load("bert", device, **_MODEL[_KIND], **sizes)
    score_and_record(benchmark, contender, workload, _SECONDS)
