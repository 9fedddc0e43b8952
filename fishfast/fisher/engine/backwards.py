"""Runs backwards over the graph of a forward, any number of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.engine.gradients import gradients
from fishfast.fisher.engine.interception import Interception, Observer
from fishfast.fisher.engine.passes import Costs

__all__ = ["HIDDEN", "Backwards", "Repeated"]

_ADDED = (
    "gradients of a sample must come from its own loss where layers are scored one sample at a "
    "time; a hook or a custom autograd function adds to those of samples whose losses weigh 0 (an "
    "activity penalty, noise); score batches of one sample each, or put the penalty into the losses"
)

HIDDEN = (
    "layers must not run again inside the backward of a custom autograd function, nor a loss_fn or "
    "a hook call backward(), where their gradients ({0}) cannot be told apart; use "
    "torch.utils.checkpoint, or torch.autograd.grad"
)


class Backwards:
    """Runs backwards to intercepted calls, and to parameters that are left to autograd.

    Args:
        interception: which calls, and who sees their gradients.
        costs: where passes and time are counted.
    """

    def __init__(self, interception: Interception, costs: Costs) -> None:
        self._interception, self.costs = interception, costs

    def run(
        self, loss: Tensor, observe: Observer | None, keep_graph: bool = True,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Run one backward; the weights' gradients of intercepted calls are not computed.

        Args:
            loss: what is differentiated.
            observe: sees the gradient of each intercepted call; None: of none.
            keep_graph: whether the graph is used again.
            inputs: tensors whose gradients are wanted.

        Returns:
            The gradients of ``inputs``.

        Raises:
            ValueError: layers that run again in a backward of their own.
        """
        interception, anchor = self._interception, self._interception.anchor
        interception.hooks.rearm()
        interception.observe = observe

        def note_task(_: Any) -> None:
            interception.task = torch._C._current_graph_task_id()

        node: Any = loss.grad_fn
        handle = node.register_prehook(note_task)
        try:
            wanted = [*inputs, anchor] if observe is not None else inputs
            grads = gradients(loss, wanted, keep_graph=keep_graph)
        finally:
            handle.remove()
            interception.observe, interception.task = None, -1
        if anchor.grad is not None:
            anchor.grad = None
            raise ValueError(HIDDEN.format("those that are batched"))
        return grads[: len(inputs)]

    def refuse_added(self, losses: Tensor, inputs: Sequence[Tensor], python: Sequence[Any]) -> None:
        """Refuse gradients that do not come from the losses: those of no loss must be 0.

        Args:
            losses: ``[B]``.
            inputs: parameters that are left to autograd.
            python: nodes of hooks and custom functions.

        Raises:
            ValueError: one of them adds some, unless it is computed from parameters alone: what a
                weight's own backward adds, it adds for each sample.
        """
        if all(_is_of_leaves(node) for node in python):
            return
        if float(self.sizes(losses * 0, inputs).nan_to_num().sum()) > 0:  # a norm of 0 gives NaN
            raise ValueError(_ADDED)

    def sizes(self, losses: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Return the size of each call's gradient, and of those of ``inputs``."""
        sizes: list[Tensor] = []

        def observe(node: Any, x: Tensor | None, grad: Tensor) -> None:
            sizes.append(grad.double().norm())

        with self.costs.of("probe", passes=1):
            grads = self.run(losses.sum(), observe, inputs=inputs)
        sizes += [grad.double().norm() for grad in grads if grad is not None]
        return torch.stack([size.cpu() for size in sizes] or [torch.zeros(())])


def _is_of_leaves(node: Any) -> bool:
    """Whether a node is computed from leaves alone, without data or an intercepted call."""
    stack = [node]
    while stack:
        node = stack.pop()
        parents = [parent for parent, _ in node.next_functions]
        if hasattr(node, "rule") or None in parents:
            return False
        stack += parents
    return True


class Repeated:
    """Compares the first backward of a graph with hooks with one after all others.

    Args:
        backwards: runs them.
        losses: ``[B]``.
        inputs: parameters that are left to autograd.
    """

    def __init__(self, backwards: Backwards, losses: Tensor, inputs: Sequence[Tensor]) -> None:
        self._backwards, self._losses, self._inputs = backwards, losses, inputs
        self._first = backwards.sizes(losses, inputs)

    def check(self) -> None:
        """Run it again.

        Raises:
            ValueError: it gives other gradients.
        """
        again = self._backwards.sizes(self._losses, self._inputs)
        if not torch.allclose(again, self._first, rtol=1e-3, atol=0, equal_nan=True):
            raise ValueError(
                "gradients must be the same when a backward runs again over one graph; they are "
                "not, behind a hook or a custom autograd function that keeps something from call "
                "to call; nothing of this call was kept; make it forget, or score batches of one "
                "sample in a loop of your own"
            )
