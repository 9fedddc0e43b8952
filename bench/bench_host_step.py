"""What the host takes for a step of 400 tiny tensors: fishfast against torch on the k values.

The floor of this table is torch's fused AdamW, the fastest there is, which writes no weight.

    FISHFAST_BENCH=cpu python -m pytest bench/bench_host_step.py -s --benchmark-enable
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch
from harness import full_size, gate, short_set
from host_steps import CONTENDERS, NUM_TENSORS, Contender, turns

from fishfast.training.values.sync import refuse_unwritten

_FLOOR = "torch AdamW fused"


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("gradients", ["of a new backward", "stepped again"])
def bench_host_step(benchmark: Any, contender: str, gradients: str) -> None:
    """Time steps of one optimizer, in turns with the others."""
    fresh = gradients == "of a new backward"
    gate(contender, lambda: _check(contender))
    times = benchmark.pedantic(_measured, args=(fresh,), rounds=1)
    own, floor = times[contender], times[_FLOOR]
    p20, _, _, p80 = statistics.quantiles(own, n=5)
    # The least of many: what a busy machine adds is no cost of the step.
    least, least_floor = min(own), min(floor)
    ratios = sorted(a / b for a, b in zip(own, floor, strict=True))
    figures = {
        "stage": "host_step", "case": f"{NUM_TENSORS} tensors of 16 values, gradients {gradients}",
        "contender": contender, "num_tensors": NUM_TENSORS, "version": torch.__version__,
        "median_us": least, "p20_us": p20, "p80_us": p80, "us_per_tensor": least / NUM_TENSORS,
        "floor_us": least_floor, "floor_name": f"{_FLOOR}, which writes no weight",
        "times_floor": least / least_floor, "times_floor_p20": ratios[len(ratios) // 5],
        "times_floor_p80": ratios[4 * len(ratios) // 5],
        "percent_of_floor": 100 * least_floor / least,
    }  # fmt: skip
    benchmark.extra_info.update(figures)
    print(
        f"{contender:<24} {gradients:<20} {least / NUM_TENSORS:>7.2f} us a tensor "
        f"{least / least_floor:>6.2f} x {_FLOOR}"
    )


def _check(name: str) -> None:
    """Every value must move, and of ours every weight with it."""
    contender = Contender(CONTENDERS[name], num_tensors=3)
    before = [p.detach().clone() for p in contender.tuned.parameters()]
    contender.backward()
    contender.optimizer.step()
    for parameter, old in zip(contender.tuned.parameters(), before, strict=True):
        assert (parameter.detach() != old).all(), "a value did not move"
        if name.startswith("fishfast"):
            refuse_unwritten(parameter, parameter.target.name)


@functools.cache
def _measured(fresh: bool) -> dict[str, list[float]]:
    """All contenders at once: they take turns."""
    repeats = 5 if not full_size() else 15 if short_set() else 100
    return turns({name: Contender(make) for name, make in CONTENDERS.items()}, repeats, fresh)
