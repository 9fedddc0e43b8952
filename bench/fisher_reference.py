"""What scores and gradients must be: those of a loop over single samples, of every call anew."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from fisher_baselines import FLOOR, Run, Scores, gradients, zeros
from fisher_models import Workload
from harness import WrongResult
from torch import Tensor

__all__ = ["WrongScores", "check", "check_again"]

# Of one entry's root and its parameter's root mean square, in fp32. What rounding made at the most
# of BERT, Llama and a convnet at the CPU's sizes, by all contenders, was 5e-5.
_ENTRY = 1e-3
# Times the workload's rounding, where that is more: a kink shows more in an entry than in the norm,
# of ResNet-18 0.005.
_KINK = 5
# What a loop over first samples alone may differ by: one kink counts for more. Scores of other
# samples are off by a factor.
_AGAIN = 0.1


class WrongScores(WrongResult):
    """Scores differ from the loop's by more than rounding, or are those of an earlier call."""


@dataclasses.dataclass(frozen=True)
class _Truth:
    """Scores of all batches, and for the floor's check the gradients of the last one."""

    scores: dict[str, Tensor]
    last_gradients: dict[str, Tensor]

    def of(self, name: str) -> dict[str, Tensor]:
        """Return what a contender must give."""
        return self.last_gradients if name == FLOOR else self.scores


def check(name: str, workload: Workload, scores: Scores) -> float:
    """Refuse scores that differ from a loop over single samples in fp32.

    Per parameter, in the Frobenius norm: at most twice the error of the same loop in the
    workload's dtype, plus the workload's rounding or 4 units in the last place of that dtype. A
    token's square for a sample's, or the square of a batch's gradient, is off by a factor. And
    scores entry by entry: the norm does not show one that is wrong.

    Args:
        name: of the contender.
        workload: what was scored.
        scores: what it gave; for the floor, the gradients of the last batch.

    Returns:
        The error over all parameters, relative to the norm of the scores.

    Raises:
        WrongScores: a parameter is missing or wrong.
    """
    exact, plain = (truth.of(name) for truth in _truths(workload))
    relative = max(workload.rounding, 4 * torch.finfo(workload.dtype).eps)
    largest = max(float(values.abs().max()) for values in exact.values())
    # Gradients that cancel to zero, as a key bias under softmax, are rounding alone: 1e-6 of the
    # largest gradient.
    rounding = 1e-6 * largest if name == FLOOR else 1e-12 * largest
    least = 1e-3 * largest**0.5  # of which a thousandth passes
    total = 0.0
    for parameter, right in exact.items():
        if parameter not in scores:
            raise WrongScores(f"{name} gave no scores for {parameter!r} of {workload.title}")
        error = float((scores[parameter].float() - right).norm())
        allowed = 2 * float((plain[parameter].float() - right).norm())
        allowed += relative * float(right.norm()) + rounding * right.numel() ** 0.5
        if not error <= allowed:  # NaN too
            raise WrongScores(
                f"{name} is wrong on {workload.title}: {parameter!r} differs from the batch-1 loop "
                f"by {error:.2e}, allowed {allowed:.2e}; no figure"
            )
        total += error**2
        if name == FLOOR:
            continue
        entry = _of_entries(scores[parameter], right, least)
        allowed = max(_KINK * workload.rounding, _ENTRY)
        if plain is not exact:
            allowed += 2 * _of_entries(plain[parameter], right, least)
        if not entry <= allowed:
            raise WrongScores(
                f"{name} is wrong on {workload.title}: an entry of {parameter!r} differs from the "
                f"batch-1 loop by {entry:.2e} of its gradient's size, allowed {allowed:.2e}; no "
                "figure"
            )
    return (total / sum(float(values.norm()) ** 2 for values in exact.values())) ** 0.5


def _of_entries(found: Tensor, right: Tensor, least: float) -> float:
    """Return the largest error of a score's root, of its size and its parameter's root mean square.

    Of roots: the norm over samples of an entry's gradients changes by no more than the norm of the
    errors, however small the entry is.
    """
    found, right = found.float().sqrt(), right.sqrt()
    size = right + (float(right.norm()) / right.numel() ** 0.5 + least)
    return float(((found - right).abs_() / size).max())


def check_again(name: str, workload: Workload, run: Run) -> None:
    """Refuse what was kept of a call before: score other samples in the same memory.

    Each batch becomes copies of its first sample, in place, and is put back. What is right costs
    one pass a batch: a loop over as many other samples would cost as much as `check` has.

    Args:
        name: of the contender.
        workload: what it scores.
        run: what is to be timed.

    Raises:
        WrongScores: the scores are not those of the samples that are there now.
    """
    before = [{key: values.clone() for key, values in batch.items()} for batch in workload.batches]
    firsts = [{key: values[:1] for key, values in batch.items()} for batch in before]
    first = _loop_with_gradients(dataclasses.replace(workload, batches=firsts)).of(name)
    try:
        _write(workload, firsts)
        scores = run()
    finally:
        _write(workload, before)
    copies = workload.sizes["batch"]
    error = sum(float((scores[n] / copies - right).norm()) ** 2 for n, right in first.items())
    error = (error / sum(float(right.norm()) ** 2 for right in first.values())) ** 0.5
    if not error <= _AGAIN:  # NaN too
        raise WrongScores(
            f"{name} is wrong on {workload.title} when it is called again with other samples in "
            f"the same memory: relative error {error:.2e}, allowed {_AGAIN:.2e}; no figure"
        )


def _write(workload: Workload, batches: list[dict[str, Tensor]]) -> None:
    for batch, source in zip(workload.batches, batches, strict=True):
        for key, values in batch.items():
            values.copy_(source[key])


@functools.lru_cache(maxsize=2)  # a workload and its head
def _truths(workload: Workload) -> tuple[_Truth, _Truth]:
    """Return what is right, from a loop in fp32, and the same loop in the workload's dtype."""
    plain = _loop_with_gradients(workload)
    if workload.dtype == torch.float32:
        return plain, plain
    batches = [
        {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        for batch in workload.batches
    ]
    model = copy.deepcopy(workload.model).float()
    return _loop_with_gradients(dataclasses.replace(workload, model=model, batches=batches)), plain


def _loop_with_gradients(workload: Workload) -> _Truth:
    truth = _Truth(zeros(workload.model), zeros(workload.model))
    first_of_last = workload.num_samples - len(next(iter(workload.batches[-1].values())))
    for position, sample in enumerate(workload.samples()):
        for name, grad in gradients(workload, sample):
            truth.scores[name] += grad.float().square()
            if position >= first_of_last:
                truth.last_gradients[name] += grad.float()
    return truth
