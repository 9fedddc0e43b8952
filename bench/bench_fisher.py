"""Scoring N samples of a whole model: fishfast against its floor and every other exact way.

The floor is a plain forward and backward of the same batches, weight gradients included: what one
pass of training costs. Peers: the batch-1 loop, torch.func's vmap, Opacus and BackPACK (see
fisher_baselines.py); one that is not installed or does not support a model is skipped by name with
the reason. No figure before its scores agree with a loop over single samples.

A line gives time per sample, the ratio to the floor (measured in turns with it) and to fishfast,
fishfast's own without its first batch (in which it finds out which row belongs to which sample),
and peak memory: weights and buffers plus the most that the call held above them. "minimum" is
weights, fp32 scores, and the peak of one batch's forward with its graph.

    FISHFAST_BENCH=full python -m pytest bench/bench_fisher.py -s --benchmark-enable
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from fisher_baselines import (
    CONTENDERS,
    FLOOR,
    Run,
    forward_backward,
    prepare,
    version_of,
)
from fisher_models import Workload, load, names
from fisher_reference import check, check_again
from harness import (
    Unavailable,
    compare,
    count_flops,
    devices,
    full_size,
    peak_bytes,
    short_set,
    skip,
)

_SECONDS = (2.0 if short_set() else 5.0) if full_size() else 0.1


@pytest.mark.parametrize("contender", [FLOOR, *CONTENDERS])
@pytest.mark.parametrize("model", names(devices()[0]))
@pytest.mark.parametrize("device", devices(), ids=str)
def bench_scoring(benchmark: Any, contender: str, model: str, device: torch.device) -> None:
    """Time one way to score one model."""
    try:
        workload = load(model, device)
    except ImportError as error:
        pytest.skip(f"{model}: {error}")
    score_and_record(benchmark, contender, workload)


def score_and_record(
    benchmark: Any, contender: str, workload: Workload, seconds: float = _SECONDS
) -> None:
    """Check a contender, then measure it, print its line and put it into the JSON.

    Args:
        benchmark: pytest-benchmark's fixture.
        contender: `FLOOR` or one of `CONTENDERS`.
        workload: what is scored.
        seconds: about how long to measure, beyond the fewest repeats.

    Raises:
        WrongScores: its scores, or fishfast's, are not those of a loop.
    """
    fishfast, further = _timed_fishfast(workload, seconds)  # no ratio to wrong scores either
    if contender != "fishfast":  # no other batch changes what it costs per sample
        workload = workload.head
    try:
        timed = fishfast if contender == "fishfast" else _timed(contender, workload, seconds)
    except Unavailable as reason:
        skip(str(reason), contender, case=workload.title, version=version_of(contender))
    timing, device = timed.timing, workload.device
    per_sample = timing["median_us"] / workload.num_samples
    held = benchmark.pedantic(peak_bytes, args=(timed.run, device), rounds=1)
    peak = _bytes_at_rest(workload) + held
    figures = {
        "us_per_sample": per_sample,
        "percent_of_floor": 100 / timing["times_floor"],
        "times_fishfast": timing["times_floor"] / fishfast.timing["times_floor"],
        "peak_bytes": peak,
        "minimum_bytes": _minimum_bytes(workload.head),
        **_counted(workload, timing["median_us"]),
    }
    if contender == "fishfast" and further > 0:  # on a busy machine a difference may be no time
        figures["times_floor_further"] = further
    benchmark.extra_info.update(
        timing,
        **figures,
        **workload.sizes,
        case=workload.title,
        contender=contender,
        version=version_of(contender),
        floor_name=FLOOR,
        num_params=sum(p.numel() for p in workload.model.parameters()),
        num_samples=workload.num_samples,
        relative_error=timed.error,
    )
    print(
        f"{contender:<24} {workload.title:<34} "
        f"{per_sample / 1e3:>10.3f} ms/sample  {timing['times_floor']:>7.2f} x floor  "
        f"{figures['times_fishfast']:>7.2f} x fishfast  {peak / 2**20:>9.1f} MiB  "
        f"{peak / figures['minimum_bytes']:>6.2f} x minimum  {figures['tflop_per_s']:.3f} TFLOP/s"
        + (
            f"  {figures['times_floor_further']:>6.2f} x floor per further batch"
            if "times_floor_further" in figures
            else ""
        )
    )


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A contender that was right: its call, its relative error, and `harness.compare`'s figures."""

    run: Run
    error: float
    timing: dict[str, float]


def _timed(contender: str, workload: Workload, seconds: float) -> _Timed:
    floor = forward_backward(workload)
    if contender == "fishfast":  # which comes first: no ratio to a wrong floor either
        check(FLOOR, workload, floor())
    run, scores = (floor, floor()) if contender == FLOOR else prepare(contender, workload)
    error = check(contender, workload, scores)
    del scores
    if len(workload.batches) == 1:  # fishfast on more is asked with the first one
        check_again(contender, workload, run)
    return _Timed(run, error, compare(run, floor, workload.device, seconds))


@functools.lru_cache(maxsize=1)
def _timed_fishfast(workload: Workload, seconds: float) -> tuple[_Timed, float]:
    """Return fishfast with its first batch, and what a further one costs in multiples of the floor.

    The first is searched for its samples, too.
    """
    timed, first = (_timed("fishfast", w, seconds) for w in (workload, workload.head))
    count = len(workload.batches)
    further = count * timed.timing["times_floor"] - first.timing["times_floor"]
    return timed, further / (count - 1)


def _counted(workload: Workload, us: float) -> dict[str, float]:
    """Return the floor's FLOPs, and what must move: weights twice a batch, scores once."""
    count = len(workload.batches)
    weights = sum(p.nbytes for p in workload.model.parameters())
    scores = 4 * sum(p.numel() for p in workload.model.parameters())
    flops, num_bytes = count * _flops(workload.head), 2 * count * weights + scores
    return {"bytes": num_bytes, "gb_per_s": num_bytes / us / 1e3,
            "flops": flops, "tflop_per_s": flops / us / 1e6}  # fmt: skip


@functools.lru_cache(maxsize=2)  # a workload's head and its own
def _flops(head: Workload) -> int:
    return count_flops(forward_backward(head))


def _bytes_at_rest(workload: Workload) -> int:
    return sum(t.nbytes for t in [*workload.model.parameters(), *workload.model.buffers()])


@functools.lru_cache(maxsize=2)
def _minimum_bytes(workload: Workload) -> int:
    """Return the bytes of weights, fp32 scores, and the peak of the first batch's forward."""

    def forward() -> Any:
        return workload.loss_fn(workload.model, workload.batches[0])

    scores = 4 * sum(p.numel() for p in workload.model.parameters())
    return _bytes_at_rest(workload) + scores + peak_bytes(forward, workload.device)
