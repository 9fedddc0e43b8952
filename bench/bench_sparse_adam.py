"""The optimizer step: fishfast's one launch against torch's AdamW, compact and dense.

Baselines with the same result: torch's fused AdamW on the compact values plus a scatter (`attach`),
and the update compiled. Dense, what a user has today: torch's fused, foreach and for-loop AdamW on
all weights. Sweeps over density, number of weights and number of tensors cross in one case. No
figure before two steps agree with a closed form in float64 and no other weight has changed.

The floor of a step on k of n weights is a copy of as many bytes as it must move: gradient, index,
master and both moments read, master and moments written, 32 bytes per selected weight; and the
parts of the weights in which one is selected, written once on a GPU (sectors of 32 bytes), read and
written on a CPU (lines of 64).

    FISHFAST_BENCH=full python -m pytest bench/bench_sparse_adam.py -s --benchmark-enable
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from adam_contenders import CONTENDERS, Step, check
from harness import Unavailable, copy_of, devices, record, short_set, skip
from shapes import count, size_set
from torch import nn

import fishfast as ff


@dataclasses.dataclass(frozen=True)
class Problem:
    """One step: how many weights, in how many tensors, what part of them trains."""

    num_params: int
    density: float
    num_tensors: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        tensors = "tensor" if self.num_tensors == 1 else "tensors"
        of = f"n={count(self.num_params)}, {100 * self.density:g} %"
        return f"{of}, {self.num_tensors} {tensors}, {dtype}"

    def floor_bytes(self, device: torch.device) -> int:
        """Return what a masked step moves at the least.

        Args:
            device: decides what a scattered write costs.
        """
        part, passes = (32, 1) if device.type == "cuda" else (64, 2)
        # Of a random mask: how many of its weights share a part of the memory.
        weights = part // self.dtype.itemsize
        touched = (1 - (1 - self.density) ** weights) * self.num_params / weights
        return int(32 * self.density * self.num_params + passes * part * touched)


def _sweeps(
    densities: list[float], sizes: list[int], tensors: list[int], centre: int
) -> list[Problem]:
    """Return three sweeps that cross at ``centre`` weights, 0.5 % and 16 tensors."""
    fp32 = torch.float32
    problems = [Problem(centre, density, 16, fp32) for density in densities]
    problems += [Problem(n, 0.005, 16, fp32) for n in sizes]
    problems += [Problem(centre, 0.005, count, fp32) for count in tensors]
    return [*dict.fromkeys(problems), Problem(centre, 0.005, 16, torch.bfloat16)]


def _gpu() -> list[Problem]:
    """What matters most first: in a short run the rest is skipped."""
    headline = [Problem(10**9, 0.005, 16, dtype) for dtype in (torch.bfloat16, torch.float32)]
    if short_set():
        sweeps = _sweeps(_DENSITIES, [10**5, 10**6, 10**7], [1, 1000, 10_000], 10**8)
    else:
        sweeps = _sweeps(_DENSITIES, [10**5, 10**6, 10**7, 10**8], _TENSORS, 10**9)
        sweeps += [Problem(7 * 10**9, 0.005, 300, torch.bfloat16)]
    return list(dict.fromkeys([*headline, *sweeps]))


_DENSITIES = [0.005, 0.0001, 0.001, 0.02, 0.1, 0.5]
_TENSORS = [1, 16, 100, 1000, 10_000]
_CPU_TENSORS = _TENSORS[:-1] if short_set() else _TENSORS  # the last takes some minutes
_PROBLEMS = {
    "toy": lambda: _sweeps([0.005, 0.5], [2**14], [1], 2**16),
    "cpu": lambda: _sweeps(_DENSITIES, [10**5, 10**6, 10**8], _CPU_TENSORS, 10**7),
    "gpu": _gpu,
}[size_set(devices()[0])]()


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("problem", _PROBLEMS, ids=str)
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_step(benchmark: Any, contender: str, problem: Problem, device: torch.device) -> None:
    """Time one optimizer step."""
    labels = {
        "stage": "sparse_adam", "case": str(problem), "num_params": problem.num_params,
        "density": problem.density, "num_tensors": problem.num_tensors,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }  # fmt: skip
    try:
        step = _step(contender, problem, device)
        dense = "dense" in contender
        moved = problem.num_params * 7 * problem.dtype.itemsize  # read 4, write 3, in its dtype
        floor_bytes = problem.floor_bytes(device)
        record(
            benchmark, step.run, device, moved if dense else floor_bytes,
            gate=lambda: _check(step, dense, problem),
            floor=copy_of(floor_bytes, device),
            floor_name="masked bytes, copied", contender=contender,
            num_selected=problem.num_params if dense else _num_selected(problem), **labels,
        )  # fmt: skip
    except Unavailable as reason:
        skip(str(reason), contender, **labels)


def _num_selected(problem: Problem) -> int:
    return int(problem.density * problem.num_params)


def _check(step: Step, dense: bool, problem: Problem) -> float:
    """Check the very step that is timed, at its size, and that it steps all that it should."""
    trained = problem.num_params if dense else _num_selected(problem)
    found = sum(g.numel() for g in step.gradients)
    assert found == trained, f"it steps {found} of {trained} weights"
    return check(step)


def _step(contender: str, problem: Problem, device: torch.device) -> Step:
    if device.type == "cuda":
        needed = problem.num_params * problem.dtype.itemsize * (6 if "dense" in contender else 3)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + held
        if needed > free:
            raise Unavailable(f"needs {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free")
    return CONTENDERS[contender](*_shared(problem, device))


@functools.lru_cache(maxsize=1)
def _shared(problem: Problem, device: torch.device) -> tuple[nn.Module, ff.SparseTuning]:
    """Contenders of one problem train the same model in turn: hashing a large one takes long."""
    return _tuned(problem, device)


def _tuned(problem: Problem, device: torch.device) -> tuple[nn.Module, ff.SparseTuning]:
    model = nn.Module()
    first, rest = divmod(problem.num_params, problem.num_tensors)
    for position in range(problem.num_tensors):
        layer = nn.Module()  # of its own, as in a real model
        size = first + (position < rest)
        # Small: next to a large weight bf16 rounds a step away, and the check would see none.
        weight = torch.empty(size, dtype=problem.dtype, device=device).normal_(std=1e-3)
        layer.register_parameter("weight", nn.Parameter(weight))
        model.add_module(f"layer{position}", layer)
    # Normal weights: the largest lie anywhere. Half a billion random indices would take a minute.
    mask = ff.top_k_mask(ff.magnitude_scores(model), k=_num_selected(problem))
    return model, ff.train_only(model, mask)
