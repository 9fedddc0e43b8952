"""Ways to get the sum of per-sample squared gradients, which all must give the same.

The contenders: fishfast; the loop over single samples of the FISH Mask authors; torch.func's
vmap(grad); Opacus (`GradSampleModule`, hooks); BackPACK (`SumGradSquared`). Each is used as its
documentation says, on its own copy of the model where it changes it. What is not installed, or
does not support a model, is `Unavailable` with the reason (fisher_reference.py has the check).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from fisher_models import Batch, Workload
from harness import Unavailable, version, why
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fishfast as ff

__all__ = [
    "CONTENDERS", "FLOOR", "Contender", "Run", "Scores", "forward_backward", "gradients", "prepare",
    "version_of", "zeros",
]  # fmt: skip

Scores = Mapping[str, Tensor]
Run = Callable[[], Scores]

FLOOR = "forward + backward"


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


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Return fp32 zeros for every parameter."""
    return {
        name: torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for name, p in model.named_parameters()
    }


def gradients(workload: Workload, batch: Batch) -> Iterator[tuple[str, Tensor]]:
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
        found: Scores = {}
        for batch in workload.batches:
            found = {}
            found = dict(gradients(workload, batch))
        return found

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
        scores = zeros(workload.model)
        for sample in workload.samples():
            for name, grad in gradients(workload, sample):
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
        scores = zeros(workload.model)
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
        scores = zeros(model)
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
        scores = zeros(model)
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
