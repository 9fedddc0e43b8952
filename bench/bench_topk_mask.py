"""The global top-k: fishfast's radix select against torch.topk and CUB's DeviceTopK.

The baselines take one tensor: a model's scores are concatenated first, and that is charged. They
give indices in no order and any of equal scores, which is less than a mask needs. CUB's is built by
cub_topk.py where a GPU, nvcc and its headers are there. No figure before a contender selects what a
stable sort does; the baselines, as many scores of every value.

The floor is one read of the scores: a copy of as many bytes on a GPU, a sum on a CPU. What
may be reached is a little more than two. On a CPU "beyond" is the memory that the process took
beyond its input, inside libraries too, and with the k indices.

    FISHFAST_BENCH=full python -m pytest bench/bench_topk_mask.py -s --benchmark-enable
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cub_topk
import pytest
import topk_reference
import torch
from harness import (
    copy_of,
    devices,
    full_size,
    read_of,
    record,
    short_set,
    skip,
    version,
)
from shapes import MODELS, count, parameter_sizes, size_set
from topk_reference import Scores, joined
from torch import Tensor

import fishfast as ff


@dataclasses.dataclass(frozen=True)
class Problem:
    """One selection; ``values`` names a function of `_VALUES`, ``model`` one of `MODELS`."""

    values: str
    num_params: int
    density: float = 0.005
    num_tensors: int = 1
    dtype: torch.dtype = torch.float32
    model: str | None = None

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        tensors = "tensor" if self.num_tensors == 1 else "tensors"
        model = f"{self.model}, " if self.model else ""
        size = f"{model}n={count(self.num_params)}, {100 * self.density:g} %"
        return f"{self.values}, {size}, {self.num_tensors} {tensors}, {dtype}"

    @property
    def k(self) -> int:
        """Number of scores to select."""
        return int(self.density * self.num_params)


def _lognormal(scores: Tensor) -> None:
    scores.log_normal_(mean=-8.0, std=2.0)


def _all_equal(scores: Tensor) -> None:
    scores.fill_(0.3)


def _mostly_zero(scores: Tensor) -> None:
    scores.uniform_().sub_(0.95).clamp_(min=0)


def _one_bin(scores: Tensor) -> None:
    """All share the upper 16 bits, 12 of bf16: the first digit tells nothing."""
    if scores.dtype == torch.bfloat16:
        scores.view(torch.int16).random_(0x3F80, 0x3F90)
    else:
        scores.view(torch.int32).random_(0x3F800000, 0x3F810000)


_VALUES = {
    "lognormal": _lognormal,
    "all equal": _all_equal,
    "mostly zero": _mostly_zero,
    "one bin": _one_bin,
}
_DENSITIES = [0.0001, 0.001, 0.005, 0.02, 0.1, 0.5]


def _problems(
    centre: int, sizes: list[int], densities: list[float], tensors: list[int], models: list[str]
) -> list[Problem]:
    """Return sweeps that cross at ``centre`` scores; what matters most first."""
    values = list(_VALUES)
    problems = [Problem("lognormal", n) for n in sizes]
    problems += [Problem(kind, centre) for kind in values]
    problems += [Problem(kind, centre, num_tensors=tensors[0]) for kind in values]
    crossed = values[:1] if short_set() or not full_size() else values
    problems += [Problem(kind, centre, d) for kind, d in itertools.product(crossed, densities)]
    problems += [Problem("lognormal", centre, num_tensors=count) for count in tensors[1:]]
    problems += [Problem(kind, centre, dtype=torch.bfloat16) for kind in ("lognormal", "one bin")]
    problems += [_of_model(model) for model in models]
    return list(dict.fromkeys(problems))


def _of_model(model: str) -> Problem:
    sizes = parameter_sizes(model)
    return Problem("lognormal", sum(sizes), num_tensors=len(sizes), model=model)


_SIZES = [10**5, 10**6, 10**7, 10**8]
_TENSORS = [400, 10_000]


def _cpu() -> list[Problem]:
    centre = 10**7 if short_set() else 2**25  # more than the caches hold
    models = list(MODELS)[: 2 if short_set() else -1]
    return _problems(centre, _SIZES, _DENSITIES, _TENSORS, models)


_PROBLEMS = {
    "toy": lambda: _problems(2**16, [2**14], [0.005, 0.5], [20], []),
    "cpu": _cpu,
    "gpu": lambda: _problems(2**30, [*_SIZES, 2**32], _DENSITIES, _TENSORS, list(MODELS)),
}[size_set(devices()[0])]()


@functools.lru_cache(maxsize=1)
def _scores(problem: Problem, device: torch.device) -> Scores:
    """Tensors of a model, or of uneven size, the largest a few hundred times the smallest."""
    if problem.model is not None:
        sizes = parameter_sizes(problem.model)
    else:
        weights = torch.arange(1, problem.num_tensors + 1).double() ** 2
        sizes = (problem.num_params * weights / weights.sum()).long().clamp(min=1).tolist()
        sizes[-1] += problem.num_params - sum(sizes)
    scores = {
        f"t{i}": torch.empty(n, dtype=problem.dtype, device=device) for i, n in enumerate(sizes)
    }
    for score in scores.values():
        _VALUES[problem.values](score)
    return scores


def _fishfast(scores: Scores, k: int) -> ff.SparseMask:
    return ff.top_k_mask(scores, k=k)


def _torch_topk(scores: Scores, k: int) -> Tensor:
    return torch.topk(joined(scores), k, sorted=False).indices


def _cub_topk(scores: Scores, k: int) -> Tensor:
    return cub_topk.top_k(joined(scores), k)


_CONTENDERS: dict[str, Callable[[Scores, int], Any]] = {
    "fishfast": _fishfast,
    "torch.topk": _torch_topk,
    "CUB DeviceTopK": _cub_topk,
}


def _check(contender: str, problem: Problem, device: torch.device) -> None:
    """No figure on a red check: fewer scores of this kind, others in their memory, then all.

    Others, because what was kept of an earlier call is not to be timed; all, because torch.topk has
    given wrong indices past 2^32 scores without a word.
    """
    small = dataclasses.replace(problem, num_params=50_000, num_tensors=20, model=None)
    scores, select = _scores.__wrapped__(small, device), _CONTENDERS[contender]
    topk_reference.check(select(scores, small.k), scores, small.k)
    for score in scores.values():
        _lognormal(score)
    topk_reference.check(select(scores, small.k), scores, small.k)
    scores = _scores(problem, device)
    topk_reference.check(select(scores, problem.k), scores, problem.k)


def _unavailable(contender: str, problem: Problem, device: torch.device) -> str | None:
    if contender == "CUB DeviceTopK" and device.type != "cuda":
        return "needs a GPU"
    if contender == "CUB DeviceTopK" and (reason := cub_topk.unavailable()):
        return reason
    if device.type == "cuda":
        needed = 3 * problem.num_params * problem.dtype.itemsize  # scores, joined, workspace
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + held
        if needed > free:
            return f"needs {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free"
    return None


@pytest.mark.parametrize("contender", _CONTENDERS)
@pytest.mark.parametrize("problem", _PROBLEMS, ids=str)
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_top_k(benchmark: Any, contender: str, problem: Problem, device: torch.device) -> None:
    """Time one selection; the bytes are those of one read of the scores."""
    labels: dict[str, Any] = {
        "stage": "topk_mask", "case": str(problem), "values": problem.values,
        "dtype": str(problem.dtype).removeprefix("torch."), "num_params": problem.num_params,
        "num_selected": problem.k, "density": problem.density, "num_tensors": problem.num_tensors,
    }  # fmt: skip
    if problem.model is not None:
        labels["model"] = problem.model
    if reason := _unavailable(contender, problem, device):
        skip(reason, contender, **labels)
    scores = _scores(problem, device)
    run = functools.partial(_CONTENDERS[contender], scores, problem.k)
    num_bytes = problem.num_params * problem.dtype.itemsize
    one_read = copy_of if device.type == "cuda" else read_of
    record(
        benchmark, run, device, num_bytes, gate=lambda: _check(contender, problem, device),
        floor=one_read(num_bytes, device), floor_name="one read", contender=contender,
        version=_version(contender), **labels,
    )  # fmt: skip
    if full_size() and (beyond := resident_beyond(run)) is not None:
        benchmark.extra_info["resident_bytes"] = beyond
        print(f"{'':<75} {beyond / 2**20:>9.1f} MiB beyond, {100 * beyond / num_bytes:.1f} %")


def _version(contender: str) -> str:
    if contender == "CUB DeviceTopK":
        return f"CCCL {cub_topk.cccl_version()}"
    package = "fishfast" if contender == "fishfast" else "torch"
    return f"{package} {version(package)}"


def resident_beyond(run: Callable[[], Any]) -> int | None:
    """Return by how much the process's memory grew at its peak; None where Linux cannot say.

    Unlike `harness.peak_bytes` it sees what libraries allocate: torch.topk queues 16 bytes per
    score. What the process held without using it is given back before.

    Args:
        run: what is looked at, on a CPU.
    """
    if torch.cuda.is_available():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(kind: str) -> int:
    found = re.search(kind + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found, kind
    return 1024 * int(found[1])
