"""`estimate_fisher`: the diagonal Fisher information, sample by sample, in batches."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from fishfast import _backend
from fishfast.fisher.interception import Interception, SecondDerivativeError
from fishfast.fisher.losses import labelled_batch_losses

__all__ = ["Fisher", "estimate_fisher"]

LossFn = Callable[[nn.Module, Any], Tensor]


class Fisher(Mapping[str, Tensor]):
    """Scores by parameter name, each fp32 and of the parameter's shape.

    Attributes:
        num_samples: how many samples were summed.
        fallback: name -> reason, for parameters whose gradients were taken one sample at a time.
    """

    def __init__(
        self, scores: Mapping[str, Tensor], num_samples: int, fallback: Mapping[str, str]
    ) -> None:
        self._scores = dict(scores)
        self.num_samples = num_samples
        self.fallback = dict(fallback)

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        weights = sum(score.numel() for score in self.values())
        return (
            f"Fisher({weights:,} weights in {len(self)} tensors, {self.num_samples:,} samples, "
            f"{len(self.fallback)} tensors one sample at a time)"
        )

    def report(self) -> str:
        """Return a table: each parameter, its mean score, and how its gradients were caught."""
        rows = [
            (name, tuple(score.shape), float(score.mean()), self.fallback.get(name, "batched"))
            for name, score in self.items()
        ]
        return tabulate(rows, headers=("parameter", "shape", "mean score", "road"))


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    num_samples: int | None = None,
    fisher_type: str = "empirical",
    power: int = 2,
    eval_mode: bool = True,
    progress: bool = False,
) -> Fisher:
    r"""Estimate the diagonal Fisher information of every trainable parameter, exactly per sample.

    .. math:: F = \sum_b \left( \nabla_\theta \, \ell_b \right)^2, \qquad
              \ell_b = -\log p_\theta(y_b | x_b)

    the sum over samples of the square of each sample's own gradient, never the square of a batch's
    gradient. This is N times the empirical Fisher of Sung, Nair and Raffel, "Training Neural
    Networks with Fixed Sparse Masks" (NeurIPS 2021), eq. 3 with the given labels. Batches may have
    any sizes; the result depends on them only by rounding.

    Linear, Embedding, Conv2d, LayerNorm and BatchNorm (fixed statistics) run batched, in one
    backward per batch. Any other use of a parameter is found by an audit of the autograd graph and
    takes one backward per sample, still exact; ``report()`` names those parameters.

    Args:
        model: any module; frozen parameters (``requires_grad=False``) are not scored. It is left
            as it was: mode, requires_grad, gradients, hooks and buffers.
        batches: an iterable of batches, such as a DataLoader.
        loss_fn: ``loss_fn(model, batch)`` returns the B losses of the batch's samples, shape
            ``[B]``. Default: for mappings with ``labels``, see `labelled_batch_losses`.
        num_samples: stop after exactly this many samples; default: all of them.
        fisher_type: ``"empirical"``, the labels given.
        power: 2 sums squares, 1 sums absolute values.
        eval_mode: score in eval mode (default) or in the model's present modes.
        progress: show a progress bar.

    Returns:
        A `Fisher`: name -> fp32 scores of the parameter's shape, on the parameter's device.

    Raises:
        TypeError: ``batches`` is one batch instead of an iterable of them, ``num_samples`` is not
            an integer, or a parameter is complex.
        ValueError: no trainable parameter, no sample, an argument out of range, losses that are
            not one finite number per sample, samples that influence each other's losses, or scores
            that overflow fp32.

    Note:
        Deterministic for the same batches on the same machine.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> def loss_fn(model, batch):
        ...     x, y = batch
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> fisher = ff.estimate_fisher(model, batches, loss_fn=loss_fn)
        >>> fisher.num_samples, fisher["weight"].shape
        (4, torch.Size([2, 3]))
    """
    _check_arguments(batches, num_samples, fisher_type, power)
    with torch.inference_mode(False):  # tensors made here must be able to take part in autograd
        return _estimate(model, batches, loss_fn, num_samples, power, eval_mode, progress)


def _estimate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    num_samples: int | None,
    power: int,
    eval_mode: bool,
    progress: bool,
) -> Fisher:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "model must have parameters with requires_grad=True to score; got "
            f"{type(model).__name__} with none"
        )
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise TypeError(
                f"parameters must be real floating-point tensors; got {p.dtype} for {name!r}"
            )
    _backend.choose("fisher", next(iter(parameters.values())).device)
    scores = {
        name: torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for name, p in parameters.items()
    }
    scorer = _Scorer(model, loss_fn or labelled_batch_losses, parameters, scores, power)
    done = 0
    with _scoring_mode(model, eval_mode), tqdm(
        total=num_samples, disable=not progress, unit=" samples", desc="fisher"
    ) as bar:  # fmt: skip
        for batch in batches:
            left = None if num_samples is None else num_samples - done
            counted = scorer.add_batch(batch, left)
            done += counted
            bar.update(counted)
            if done == num_samples:
                break
    if done == 0:
        raise ValueError("batches must give at least one sample; got none")
    if num_samples is not None and done < num_samples:
        warnings.warn(
            f"num_samples={num_samples}, but batches gave only {done} samples", stacklevel=3
        )
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(
                f"the scores of {name!r} are not finite: a sample's gradient is NaN, infinite or "
                "above 1.8e19, whose square overflows fp32; check the losses, or scale them down"
            )
    return Fisher(scores, done, scorer.fallback)


def _check_arguments(
    batches: Iterable[Any], num_samples: int | None, fisher_type: str, power: int
) -> None:
    if isinstance(batches, (Mapping, Tensor, str)):
        raise TypeError(
            f"batches must be an iterable of batches; got one {type(batches).__name__}; "
            "pass [batch] to score a single batch"
        )
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches must be an iterable of batches; got one {type(batches).__name__}")
    if num_samples is not None and (
        isinstance(num_samples, bool) or not hasattr(num_samples, "__index__")
    ):
        raise TypeError(f"num_samples must be an integer; got {num_samples!r}")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if fisher_type != "empirical":
        raise ValueError(f"fisher_type must be 'empirical'; got {fisher_type!r}")
    if power not in (1, 2):
        raise ValueError(f"power must be 2 (squares) or 1 (absolute values); got {power!r}")


@contextlib.contextmanager
def _scoring_mode(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """Eval mode while scoring; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"{name or 'the model'!r} must have running statistics; got a "
                f"{type(module).__name__} with track_running_stats=False, which mixes samples in "
                "every mode; replace it"
            )
        if module.training and not eval_mode and (batch_norm or _dropout(module) > 0):
            raise ValueError(
                f"eval_mode=False needs {name or 'the model'!r} in eval mode; got a "
                f"{type(module).__name__} in train mode, which mixes samples or adds noise; "
                "call .eval() on it or leave eval_mode=True"
            )
    try:
        if eval_mode:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _dropout(module: nn.Module) -> float:
    """Return the dropout probability that a module has of its own."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout
    return 0.0


class _Scorer:
    """Adds batches to the scores."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        parameters: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        power: int,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.parameters, self.scores, self.power = parameters, scores, power
        self.interception = Interception(parameters, scores, power)
        self.fallback: dict[str, str] = {}
        self.verified: set[str] = set()  # names whose calls were seen to keep samples apart

    def add_batch(self, batch: Any, limit: int | None) -> int:
        """Score one batch, at most ``limit`` samples of it; return how many were counted."""
        # Backward runs in this thread, so that checkpointed layers that run again inside it are
        # intercepted on every device.
        device = next(iter(self.parameters.values())).device.type
        with (
            _not_compiled(),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),
            self.interception,
        ):
            losses = self._audited_losses(batch)
            with torch.autocast(device, enabled=False):
                while leaking := self._find_leaks(losses):
                    self._leave_to_autograd(leaking)
                    losses = self._audited_losses(batch)
                counted = len(losses) if limit is None else min(limit, len(losses))
                self._add_intercepted(losses, counted)
                self._add_fallback(losses, counted)
        return counted

    def _audited_losses(self, batch: Any) -> Tensor:
        """Run the forward until every parameter that calls do not cover is left to autograd."""
        while True:
            try:
                losses = self.loss_fn(self.model, batch)
            except SecondDerivativeError:
                reason = "loss_fn takes a gradient with create_graph=True"
                self._leave_to_autograd(dict.fromkeys(self._intercepted(), reason))
                continue
            _check_losses(losses, batch)
            reasons = self.interception.audit(losses)
            if not reasons:
                return losses
            self._leave_to_autograd(reasons)

    def _leave_to_autograd(self, reasons: Mapping[str, str]) -> None:
        self.fallback.update(reasons)
        self.interception.left_to_autograd.update(reasons)

    def _intercepted(self) -> list[str]:
        return [name for name in self.parameters if name not in self.fallback]

    def _find_leaks(self, losses: Tensor) -> dict[str, str]:
        """Look at one sample whether losses and the rows of intercepted calls go together.

        Its loss must reach only its own row of every call, and the other losses every row but that
        one. Catches losses that couple samples, and calls whose dim 0 has the batch's size by
        accident. A call that no gradient reaches is looked at again in the next batch.

        Args:
            losses: of a forward whose graph is kept.

        Returns:
            Name -> reason, for the parameters of calls whose rows are not the samples.

        Raises:
            ValueError: that is so in every call: the losses couple samples.
        """
        interception = self.interception
        names = self._intercepted()
        if len(losses) < 2 or self.verified.issuperset(interception.used.intersection(names)):
            return {}
        # The largest loss: a sample without labels has no gradient to look at.
        own = torch.zeros_like(losses, dtype=torch.bool)
        own[losses.detach().argmax()] = True
        leaking: set[str] = set()
        touched: set[str] = set()
        reached = set(names)
        for rows in (own, ~own):
            interception.probe = rows
            interception.leaking, interception.reached = set(), set()
            try:
                self._backward(losses[rows].sum(), names, retain_graph=True)
            finally:
                interception.probe = None
            leaking |= interception.leaking
            touched |= interception.leaking | interception.reached
            reached &= interception.reached
        if leaking and leaking == touched:
            raise ValueError(
                "loss_fn must return losses that depend on one sample each; the gradient of one "
                f"loss reaches other samples in every layer, {min(leaking)!r} for one (a batch "
                "mean, a loss between samples, or a batch that is not on dim 0); use "
                "reduction='none'"
            )
        self.verified |= reached - leaking
        return {
            name: "the gradient of one loss reaches several rows of dim 0"
            for name in names
            if name in leaking
        }

    def _add_intercepted(self, losses: Tensor, counted: int) -> None:
        self.interception.recording = True
        try:
            total = losses[:counted].sum()
            self._backward(total, self._intercepted(), retain_graph=bool(self.fallback))
        finally:
            self.interception.recording = False

    def _backward(self, loss: Tensor, names: list[str], retain_graph: bool) -> None:
        """Run the intercepted calls' backwards; they return no gradient for their parameters."""
        if names:
            _gradients(loss, [self.parameters[name] for name in names], retain_graph)

    def _add_fallback(self, losses: Tensor, counted: int) -> None:
        """One backward per sample, for the parameters that no rule covers."""
        names = list(self.fallback)
        if not names:
            return
        inputs = [self.parameters[name] for name in names]
        for loss in losses[:counted]:
            grads = _gradients(loss, inputs, retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    grad = grad.float()
                    self.scores[name] += grad.square() if self.power == 2 else grad.abs()


def _not_compiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly: calls inside a compiled graph cannot be intercepted."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; its import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _gradients(
    loss: Tensor, inputs: list[nn.Parameter], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return what torch.autograd.grad does, without leaving the function mode.

    The mode would take grad() itself for a function to handle and step aside while it runs, and a
    checkpointed layer, which runs again in there, would not be intercepted the second time.
    """
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(
        (loss,), (torch.ones_like(loss),), retain_graph, False, tuple(inputs), True,
        accumulate_grad=False,
    )  # fmt: skip


def _check_losses(losses: Any, batch: Any) -> None:
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"loss_fn must return a tensor of per-sample losses; got {type(losses).__name__}"
        )
    if losses.dim() != 1:
        got = "a scalar" if losses.dim() == 0 else f"shape {tuple(losses.shape)}"
        raise ValueError(
            f"loss_fn must return one loss per sample, shape [B]; got {got}; "
            "use reduction='none' and average over each sample's own elements"
        )
    if len(losses) == 0 or not losses.requires_grad:
        raise ValueError(
            f"loss_fn must return losses that depend on trainable parameters; got {len(losses)} "
            f"losses with requires_grad={losses.requires_grad}"
        )
    if not torch.isfinite(losses).all():
        index = int((~torch.isfinite(losses)).nonzero()[0])
        value = float(losses[index].detach())
        raise ValueError(f"loss_fn must return finite losses; got {value} for sample {index}")
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    rows = {shape[0] for shape in shapes}
    # A batch with time first, [T, B], has B losses too.
    if len(rows) == 1 and not any(len(losses) in shape for shape in shapes):
        (size,) = rows
        if len(losses) > size > 0 and len(losses) % size == 0:
            raise ValueError(
                f"loss_fn must return one loss per sample; got {len(losses)} losses for a batch of "
                f"{size} (one per token?); average over each sample's own elements"
            )
