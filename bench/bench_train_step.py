"""A whole training step: time and peak memory of fishfast, full fine-tuning, LoRA and SHiRA.

A step is forward, backward, clipping and the optimizer. The floor is the forward and backward of
full fine-tuning, timed in turns with each contender (see train_contenders.py, also for what they
train). No figure before the gate: the gradients of the masked weights, and the loss after two
steps, are those of dense training with the gradient times the mask (one like a Fisher's, from
rank_one.py, and a random one); weights that train move, by the
learning rate in Adam's first step; all others keep their bits; the floor computes every gradient.

Memory is all that a training holds at its peak: weights, optimizer state, indices, gradients and
activations. "saved" is how much less that is than in full fine-tuning, in percent of full
fine-tuning's gradients and optimizer state: above 100 where activations are saved too.

    FISHFAST_BENCH=full python -m pytest bench/bench_train_step.py -s --benchmark-enable
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from fisher_models import Workload, build
from harness import (
    Unavailable,
    compare,
    count_flops,
    devices,
    full_size,
    gate,
    peak_bytes,
    short_set,
    skip,
)
from rank_one import rank_one_mask
from shapes import BERT_LARGE, LLAMA_1B, size_set
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from train_contenders import CONTENDERS, FLOOR, Budget, Masks, Training, label, prepare
from train_reference import Reference, check, check_floor, train_reference

import fishfast as ff

_SECONDS = (1.0 if short_set() else 3.0) if full_size() else 0.02

_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "toy": {
        "bert": {"layers": 2, "hidden": 32, "heads": 2, "vocab": 100, "length": 16,
                 "batch_size": 3},
        "llama": {"layers": 2, "hidden": 32, "heads": 8, "intermediate": 48, "vocab": 100,
                  "length": 16, "batch_size": 3},
    },
    "cpu": {
        # 50 million parameters.
        "bert-50M": {"layers": 8, "hidden": 640, "heads": 10, "vocab": 16384, "length": 128,
                     "batch_size": 1},
        "llama": {"layers": 4, "hidden": 512, "heads": 8, "intermediate": 1376, "vocab": 8000,
                  "length": 128, "batch_size": 4},
        "bert": {"layers": 4, "hidden": 512, "heads": 8, "vocab": 30522, "length": 128,
                 "batch_size": 8},
    },
    "gpu": {
        "bert-large": {**BERT_LARGE, "length": 128, "batch_size": 32},
        "llama-1B": {**LLAMA_1B, "length": 1024, "batch_size": 4},
    },
}  # fmt: skip
_CASES = _SIZES[size_set(devices()[0])]
if short_set():  # the rest would take the time of other files
    _CASES = dict(list(_CASES.items())[:2])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_train_step(benchmark: Any, contender: str, case: str, device: torch.device) -> None:
    """Time one way to train one model."""
    pytest.importorskip("transformers", reason="the models are those of transformers")
    train_and_record(benchmark, contender, case, device)


def train_and_record(benchmark: Any, contender: str, case: str, device: torch.device) -> None:
    """Check a contender, then measure it, print its line and put it into the JSON.

    Args:
        benchmark: pytest-benchmark's fixture.
        contender: one of `CONTENDERS`.
        case: one of the models.
        device: where it trains.

    Raises:
        WrongResult: it does not train what it should.
    """
    budget, masks, title, num_params = _prepared(case, device)
    try:
        training, error, total = _measured(contender, case, device)
    except Unavailable as reason:
        skip(str(reason), contender, stage="train_step", case=title)
    full, state = _memory_of_full(case, device)
    timing = compare(training.step, _floor(case, device).step, device, _SECONDS)
    benchmark.pedantic(training.step, rounds=1)  # its wall clock is not used
    saved = 100 * (full - total) / state
    flops, us = _flops(case, device), timing["median_us"]
    trained = budget.num_selected if contender == "dense masked AdamW" else training.num_trained
    sizes = _CASES[case]
    benchmark.extra_info.update(
        timing, stage="train_step", case=title, contender=contender, version=label(contender),
        floor_name=FLOOR, percent_of_floor=100 / timing["times_floor"], total_bytes=total,
        bytes_of_full=full, percent_saved=saved, num_params=num_params, num_selected=trained,
        density=trained / num_params, batch=sizes["batch_size"], length=sizes["length"],
        rank=_rank(contender, budget), flops=flops, tflop_per_s=flops / us / 1e6,
    )  # fmt: skip
    if error is not None:
        benchmark.extra_info["relative_error"] = error
    print(
        f"{contender:<32} {title:<30} {timing['median_us'] / 1e3:>9.2f} ms  "
        f"{timing['times_floor']:>5.2f} x floor  {total / 2**20:>8.1f} MiB  "
        f"{total / full:>5.2f} x full  {saved:>6.1f} % saved  {trained:>11,} trained"
    )


def _rank(contender: str, budget: Budget) -> int | None:
    if CONTENDERS[contender].package != "peft":
        return None
    return budget.queries_rank if "queries" in contender else budget.rank


def _make(case: str, device: torch.device) -> Workload:
    dtype = torch.bfloat16 if size_set(device) == "gpu" else torch.float32
    workload = build(case.split("-")[0], device, dtype, **_CASES[case], batches=1)
    workload.model.train()
    return workload


@functools.lru_cache(maxsize=1)
def _prepared(case: str, device: torch.device) -> tuple[Budget, Masks, str, int]:
    """Return how many weights train and which, and what the case is called."""
    workload = _make(case, device)
    model = workload.model
    budget = Budget.of(model)
    masks = {
        # Of a random model the Fisher is narrower than that of a trained one.
        "fish": rank_one_mask(model, k=budget.num_selected),
        "random": ff.random_mask(model, k=budget.num_selected, seed=0),
    }
    return budget, masks, workload.title, sum(p.numel() for p in model.parameters())


@functools.lru_cache(maxsize=2)
def _reference(case: str, device: torch.device, mask: str) -> Reference:
    return train_reference(_make(case, device), _prepared(case, device)[1][mask])


def _measured(
    contender: str, case: str, device: torch.device
) -> tuple[Training, float | None, int]:
    """Return a training, its gate's relative error, and the bytes that it holds at its peak."""
    budget, masks, *_ = _prepared(case, device)
    mask = {"fishfast": "fish", "fishfast, random mask": "random", "dense masked AdamW": "fish"}
    reference = _reference(case, device, mask[contender]) if contender in mask else None
    before = resident_bytes(device)
    workload = _make(case, device)
    weights = dict(workload.model.named_parameters())
    training = prepare(contender, workload, budget, masks)
    title = f"{contender} on {workload.title}"
    error = gate(title, lambda: check(training, weights, reference))
    resident = resident_bytes(device) - before
    return training, error, resident + peak_bytes(training.step, device)


@functools.lru_cache(maxsize=1)
def _memory_of_full(case: str, device: torch.device) -> tuple[int, int]:
    """Return the bytes that full fine-tuning holds, and of them its gradients and state."""
    training, _, total = _measured("full fine-tuning", case, device)
    assert training.optimizer is not None
    state = sum(t.nbytes for s in training.optimizer.state.values() for t in s.values())
    return total, state + sum(p.nbytes for p in training.parameters)


@functools.lru_cache(maxsize=1)
def _floor(case: str, device: torch.device) -> Training:
    """Return the floor; no ratio to a wrong one."""
    budget, masks, *_ = _prepared(case, device)
    reference, workload = _reference(case, device, "fish"), _make(case, device)
    weights = dict(workload.model.named_parameters())
    training = prepare(FLOOR, workload, budget, masks)
    gate(f"{FLOOR} on {workload.title}", lambda: check_floor(training, weights, reference))
    return training


@functools.lru_cache(maxsize=1)
def _flops(case: str, device: torch.device) -> int:
    """Return those of the floor, which every contender's are held against."""
    return count_flops(_floor(case, device).step)


def resident_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors that are there now.

    On a GPU by the allocator's counter, on a CPU by the storages of all tensors that Python knows.

    Args:
        device: whose.
    """
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # Fake tensors, which torch.compile leaves behind, have no memory.
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    found = (o for o in tensors if not issubclass(type(o), (FakeTensor, FunctionalTensor)))
    storages = {}
    for tensor in found:
        if tensor.device == device and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
