"""Host cost of training, inference and scoring: tiny models, one thread, the least CPU time.

The floor is the same pass of full fine-tuning, run in turns (see host_cost.py). No figure before
the gate: the tuned model's gradients are the dense ones under the mask, and scores those of a loop.

    FISHFAST_BENCH=full python -m pytest bench/bench_host.py -s --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Unavailable, full_size, gate, skip, version
from host_cost import MODELS, WAYS, Pass, least_seconds, passes, scored_seconds
from host_counts import counted

import fishfast as ff

_ROUNDS = 60 if full_size() else 1
_FLOOR = "full fine-tuning"
_RUNS = ("forward + backward", "forward in no_grad")
_SCORED = {"a further scored batch": "further", "the first scored batch": "first"}
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
    benchmark.pedantic(runs[contender], rounds=1)  # its wall clock is not used
    _write_down(benchmark, title, contender, least[contender], least[_FLOOR], of[contender])


@pytest.mark.parametrize("run", list(_SCORED))
@pytest.mark.parametrize("case", list(MODELS))
def bench_scoring(benchmark: Any, run: str, case: str) -> None:
    """Time the scoring of a batch, in turns with a plain forward and backward in train mode."""
    pytest.importorskip("transformers", reason="the models are those of transformers")
    title = f"{case}, {run}"
    plain = passes(case, [_FLOOR])[_FLOOR]
    gate(f"fishfast on {title}", lambda: check_scores(plain))
    least = scored_seconds(plain, max(1, _ROUNDS // 6))
    benchmark.pedantic(plain.forward, rounds=1)  # its wall clock is not used
    batches = _counts(plain)
    counts = batches[0 if _SCORED[run] == "first" else -1]
    benchmark.extra_info.update(launches=counts.num_launches, waits=counts.waits.total())
    _write_down(benchmark, title, "fishfast", least[_SCORED[run]], least["plain"], plain)


def _counts(plain: Pass) -> list[Any]:
    """Return what each of three scored batches asks of the device."""
    found = []

    def batches() -> Any:
        for _ in range(3):
            before = running.copy()
            yield plain.batch
            found.append(running - before)

    with counted() as running:
        ff.estimate_fisher(plain.model, batches())
    return found


def _write_down(
    benchmark: Any, title: str, contender: str, seconds: float, floor: float, of: Pass
) -> None:
    us, floor_us = 1e6 * seconds, 1e6 * floor
    ratio = us / floor_us
    package = {"fishfast": "fishfast", "LoRA all-linear": "peft"}.get(contender, "torch")
    benchmark.extra_info.update(
        stage="host", case=title, contender=contender, floor_name=_FLOOR,
        version=f"{package} {version(package)}", median_us=us, p20_us=us, p80_us=us,
        floor_us=floor_us, times_floor=ratio, times_floor_p20=ratio, times_floor_p80=ratio,
        percent_of_floor=100 / ratio, num_tensors=len(of.parameters),
    )  # fmt: skip
    print(f"{contender:<20} {title:<44} {us / 1e3:>8.2f} ms of CPU  {ratio:>5.2f} x {_FLOOR}")


def check_scores(plain: Pass) -> None:
    """Refuse scores that are not the squares of each sample's own gradient.

    Args:
        plain: a model and a batch.

    Raises:
        AssertionError: they differ.
    """
    fisher = ff.estimate_fisher(plain.model, [plain.batch] * 2)
    plain.model.eval()  # as scoring has it
    loop = {name: torch.zeros_like(p) for name, p in plain.model.named_parameters()}
    for sample in range(len(plain.batch["labels"])):
        plain.model.zero_grad()
        one = {name: tensor[sample : sample + 1] for name, tensor in plain.batch.items()}
        plain.model(**one).loss.backward()
        for name, parameter in plain.model.named_parameters():
            if parameter.grad is not None:
                loop[name] += 2 * parameter.grad.square()
    plain.model.train().zero_grad()
    # A key's bias has no gradient but rounding: what is compared is small beside other scores.
    small = 1e-6 * max(float(score.max()) for score in loop.values())
    for name, score in fisher.items():
        torch.testing.assert_close(score, loop[name], rtol=1e-3, atol=small)


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
