"""Host cost of training and inference: tiny models, one thread, the least CPU time of many passes.

The floor is the same pass of full fine-tuning, run in turns (see host_cost.py). No figure before
the gate: the tuned model's gradients are the dense ones under the mask.

    FISHFAST_BENCH=full python -m pytest bench/bench_host.py -s --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Unavailable, full_size, gate, skip, version
from host_cost import MODELS, WAYS, Pass, least_seconds, passes

_ROUNDS = 60 if full_size() else 1
_FLOOR = "full fine-tuning"
_RUNS = ("forward + backward", "forward in no_grad")
_DEVICE = torch.device("cpu")  # in front of a GPU the host does the same


@pytest.mark.parametrize("contender", list(WAYS))
@pytest.mark.parametrize("run", _RUNS)
@pytest.mark.parametrize("case", list(MODELS))
def bench_host(benchmark: Any, contender: str, run: str, case: str) -> None:
    """Time one way to train one model, in turns with full fine-tuning."""
    pytest.importorskip("transformers", reason="the models are those of transformers")
    title = f"{case}, {run}"
    try:
        of = passes(case, list(dict.fromkeys([_FLOOR, contender])))
    except Unavailable as reason:
        skip(str(reason), contender, stage="host", case=title)
    if contender == "fishfast":
        gate(f"fishfast on {title}", lambda: check(of[_FLOOR], of[contender]))
    runs = {way: found.backward if run == _RUNS[0] else found.forward for way, found in of.items()}
    least = least_seconds(runs, _ROUNDS)
    us, floor_us = 1e6 * least[contender], 1e6 * least[_FLOOR]
    ratio = us / floor_us
    benchmark.pedantic(runs[contender], rounds=1)  # its wall clock is not used
    package = {"fishfast": "fishfast", "LoRA all-linear": "peft"}.get(contender, "torch")
    benchmark.extra_info.update(
        stage="host", case=title, contender=contender, floor_name=_FLOOR,
        version=f"{package} {version(package)}", median_us=us, p20_us=us, p80_us=us,
        floor_us=floor_us, times_floor=ratio, times_floor_p20=ratio, times_floor_p80=ratio,
        percent_of_floor=100 / ratio, num_tensors=len(of[contender].parameters),
    )  # fmt: skip
    print(f"{contender:<20} {title:<44} {us / 1e3:>8.2f} ms of CPU  {ratio:>5.2f} x {_FLOOR}")


def check(plain: Pass, tuned: Pass) -> None:
    """Refuse gradients of a tuned model that are not the dense ones under its mask.

    Args:
        plain: of the same weights.
        tuned: by fishfast.

    Raises:
        AssertionError: they differ, or there are none.
    """
    for found in (plain, tuned):
        found.model.eval()  # no dropout
        found.model(**found.batch).loss.backward()
    dense, compared = dict(plain.model.named_parameters()), 0
    for name, values in tuned.model.named_parameters():
        if values.requires_grad:
            grad = dense[name.removesuffix("_values")].grad.flatten()[values.target.indices.long()]
            torch.testing.assert_close(values.grad, grad)
            compared += len(grad)
    assert compared, "no gradient was compared"
    for found in (plain, tuned):
        found.model.train().zero_grad()
