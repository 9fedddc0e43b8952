"""Scores one batch: forward, audit, one backward for intercepted calls, fallback for the rest."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishfast.fisher.interception import Interception, SecondDerivativeError

__all__ = ["LossFn", "Scorer"]

LossFn = Callable[[nn.Module, Any], Tensor]


class Scorer:
    """Adds batches to the scores.

    Args:
        model: what is scored.
        loss_fn: ``loss_fn(model, batch)`` returns one loss per sample.
        parameters: the parameters to score, by name.
        scores: fp32 accumulators by the same names, added to in place.
        power: 2 for squares, 1 for absolute values.
    """

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
        one. Catches losses that couple samples in every call, and calls whose dim 0 has the
        batch's size by accident. Where some calls keep samples apart, the others are left to
        autograd: each loss's own gradient, whatever it depends on. A call that no gradient reaches
        is looked at again in the next batch.

        Args:
            losses: of a forward whose graph is kept.

        Returns:
            Name -> reason, for the parameters of calls whose rows are not the samples.

        Raises:
            ValueError: rows and losses go together in no call: the losses couple samples.
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
                f"loss reaches other samples in every batched layer, {min(leaking)!r} for one (a "
                "batch mean, a loss between samples, or a batch that is not on dim 0); use "
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
    if len(losses) > 1 and losses.stride(0) == 0:
        raise ValueError(
            "loss_fn must return losses that depend on one sample each; got one value expanded to "
            f"{len(losses)}; use reduction='none'"
        )
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return  # a batch with its own idea of a sample, such as lists of images and of labels
    shapes = [leaf.shape for leaf in leaves if leaf.dim()]
    rows = {shape[0] for shape in shapes}
    # A batch with time first, [T, B] in every tensor, has B losses too.
    if len(rows) == 1 and not all(len(losses) in shape[1:] for shape in shapes):
        (size,) = rows
        mean = len(losses) == 1 < size
        if mean or (len(losses) > size > 0 and len(losses) % size == 0):
            raise ValueError(
                f"loss_fn must return one loss per sample; got {len(losses)} losses for a batch of "
                f"{size} ({'their mean' if mean else 'one per token'}?); use reduction='none' and "
                "average over each sample's own elements; if a batch is one sample (a bag), give "
                "its tensors a leading dim of 1"
            )
