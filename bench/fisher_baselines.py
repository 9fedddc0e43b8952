"""Ways to get the sum of per-sample squared gradients, and the check that all give the same.

The contenders: fishfast; the loop over single samples of the FISH Mask authors; torch.func's
vmap(grad); Opacus (`GradSampleModule`, hooks); BackPACK (`SumGradSquared`). Each is used as its
documentation says, on its own copy of the model where it changes it. What is not installed, or
does not support a model, is `Unavailable` with the reason; a score that is wrong is `WrongScores`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fisher_models import Batch, Workload
from harness import Unavailable, WrongResult, version, why
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fishfast as ff

__all__ = [
    "CONTENDERS", "FLOOR", "Contender", "Run", "Scores", "WrongScores", "check", "forward_backward",
    "prepare", "version_of",
]  # fmt: skip

Scores = Mapping[str, Tensor]
Run = Callable[[], Scores]

FLOOR = "forward + backward"


class WrongScores(WrongResult):
    """A contender's scores differ from the loop's by more than rounding: it gets no figure."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to score.

    Args:
        build: takes a workload and returns the call that scores it; set-up is done before.
        package: whose version goes with its figures.
        peer: not ours: it may fail on a model, and is timed on the first batch alone, since no
            other batch changes its cost per sample.
    """

    build: Callable[[Workload], Run]
    package: str = "torch"
    peer: bool = True


@dataclasses.dataclass(frozen=True)
class _Truth:
    """Scores of all batches, and for the floor's check the gradients of the last one."""

    scores: dict[str, Tensor]
    last_gradients: dict[str, Tensor]


def version_of(name: str) -> str:
    """Return the package that does a contender's work, with its version."""
    package = CONTENDERS[name].package if name in CONTENDERS else "torch"
    return f"{package} {version(package)}"


def prepare(name: str, workload: Workload) -> tuple[Run, Scores]:
    """Set a contender up and run it once.

    Args:
        name: one of `CONTENDERS`.
        workload: what it scores.

    Returns:
        The call to time, and the scores that it gave.

    Raises:
        Unavailable: a peer is not installed or failed on this model.
    """
    try:
        run = CONTENDERS[name].build(workload)
        return run, run()
    except Exception as error:
        if not CONTENDERS[name].peer:
            raise
        reason = why(error)
    # Out here, so that the traceback does not keep what a peer allocated before it failed.
    raise Unavailable(reason)


def check(name: str, workload: Workload, scores: Scores) -> float:
    """Refuse scores that differ from a loop over single samples in fp32.

    Per parameter, in the Frobenius norm: at most twice the error of the same loop in the
    workload's dtype, plus the workload's rounding or 4 units in the last place of that dtype. A
    token's square for a sample's, or the square of a batch's gradient, is off by a factor.

    Args:
        name: of the contender.
        workload: what was scored.
        scores: what it gave; for the floor, the gradients of the last batch.

    Returns:
        The error over all parameters, relative to the norm of the scores.

    Raises:
        WrongScores: a parameter is missing or wrong.
    """
    exact, plain = (
        truth.last_gradients if name == FLOOR else truth.scores for truth in _truths(workload)
    )
    relative = max(workload.rounding, 4 * torch.finfo(workload.dtype).eps)
    largest = max(float(values.abs().max()) for values in exact.values())
    # Gradients that cancel to zero, as a key bias under softmax, are rounding alone: 1e-6 of the
    # largest gradient.
    rounding = 1e-6 * largest if name == FLOOR else 1e-12 * largest
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
    return (total / sum(float(values.norm()) ** 2 for values in exact.values())) ** 0.5


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
    truth = _Truth(_zeros(workload.model), _zeros(workload.model))
    first_of_last = workload.num_samples - len(next(iter(workload.batches[-1].values())))
    for position, sample in enumerate(workload.samples()):
        for name, grad in _gradients(workload, sample):
            truth.scores[name] += grad.float().square()
            if position >= first_of_last:
                truth.last_gradients[name] += grad.float()
    return truth


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for name, p in model.named_parameters()
    }


def _gradients(workload: Workload, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Run forward and backward of the summed losses; yield the gradients by name."""
    workload.model.zero_grad()
    workload.loss_fn(workload.model, batch).sum().backward()
    for name, p in workload.model.named_parameters():
        if p.grad is not None:
            yield name, p.grad
    workload.model.zero_grad()


def forward_backward(workload: Workload) -> Run:
    """Return the floor: what a step of training runs on the same batches, without the optimizer."""

    def run() -> Scores:
        gradients: Scores = {}
        for batch in workload.batches:
            gradients = {}
            gradients = dict(_gradients(workload, batch))
        return gradients

    return run


def _fishfast(workload: Workload) -> Run:
    def run() -> Scores:
        return ff.estimate_fisher(
            workload.model, workload.batches, loss_fn=workload.loss_fn,
            num_samples=workload.num_samples,
        )  # fmt: skip

    return run


def _loop(workload: Workload) -> Run:
    def run() -> Scores:
        scores = _zeros(workload.model)
        for sample in workload.samples():
            for name, grad in _gradients(workload, sample):
                scores[name] += torch.square(grad)
        return scores

    return run


def _vmap(workload: Workload) -> Run:
    parameters = {name: p.detach() for name, p in workload.model.named_parameters()}

    def loss_of_one(parameters: dict[str, Tensor], sample: Batch) -> Tensor:
        def model(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(workload.model, parameters, args, kwargs)

        batch = {name: values.unsqueeze(0) for name, values in sample.items()}
        return workload.loss_fn(model, batch).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0))

    def run() -> Scores:
        scores = _zeros(workload.model)
        for batch in workload.batches:
            with sdpa_kernel(SDPBackend.MATH):  # vmap runs the fused ones sample by sample
                grads = per_sample(parameters, batch)
            for name in scores:
                _add_squares(scores[name], grads.pop(name))
        return scores

    return run


def _opacus(workload: Workload) -> Run:
    from opacus import GradSampleModule

    model = copy.deepcopy(workload.model).train()  # its hooks are off in eval mode
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")

    def run() -> Scores:
        scores = _zeros(model)
        for batch in workload.batches:
            workload.loss_fn(wrapped, batch).sum().backward()
            for name, p in model.named_parameters():
                _add_squares(scores[name], p.grad_sample)
                p.grad_sample = None
            wrapped.zero_grad()
        return scores

    return run


def _backpack(workload: Workload) -> Run:
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    # It skips other layers with no more than a warning.
    for module in workload.model.modules():
        if type(module) not in _BACKPACK_LAYERS and list(module.parameters(recurse=False)):
            raise NotImplementedError(f"SumGradSquared has no rule for {type(module).__name__}")
    model, extension = extend(copy.deepcopy(workload.model)), SumGradSquared()

    def run() -> Scores:
        scores = _zeros(model)
        for batch in workload.batches:
            with backpack(extension):
                workload.loss_fn(model, batch).sum().backward()
            for name, p in model.named_parameters():
                scores[name] += p.sum_grad_squared
                del p.sum_grad_squared
            model.zero_grad()
        return scores

    return run


_BACKPACK_LAYERS = {
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding, nn.RNN,
    nn.LSTM,
}  # fmt: skip


def _add_squares(score: Tensor, per_sample: Tensor) -> None:
    """Add squares of [B, ...] to a score; fp32 gradients are overwritten."""
    score += per_sample.float().square_().sum(0)


CONTENDERS: dict[str, Contender] = {
    "fishfast": Contender(_fishfast, "fishfast", peer=False),
    "batch-1 loop": Contender(_loop),
    "torch.func vmap": Contender(_vmap),
    "Opacus": Contender(_opacus, "opacus"),
    "BackPACK": Contender(_backpack, "backpack-for-pytorch"),
}
