"""Catches per-sample gradients in one backward pass, and audits that none is missed.

`Interception` is a torch function mode: while it is active, a call that has a rule (see rules.py)
runs inside an autograd function whose backward adds per-sample scores instead of computing the
weight's own gradient. Any other use of a parameter stays in autograd's hands. The audit then walks
the autograd graph from the losses: every edge that ends at a parameter either comes from an
intercepted call or makes that parameter one for the exact fallback. So nothing is skipped, whatever
the model did with its weights (views, in-place code, custom autograd functions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishfast.fisher.rules import RULES, Rule

__all__ = ["Interception", "SecondDerivativeError"]


class SecondDerivativeError(RuntimeError):
    """A loss takes a gradient with create_graph=True, and no rule has a second derivative."""


class Interception(TorchFunctionMode):
    """Intercepts calls that use tracked parameters.

    Args:
        parameters: the tracked parameters by name.
        scores: fp32 accumulators by the same names, added to in place while `recording`.
        power: 2 for squares, 1 for absolute values.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], scores: Mapping[str, Tensor], power: int
    ) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.scores = scores
        self.power = power
        self.left_to_autograd: set[str] = set()  # names that are not intercepted any more
        self.used: set[str] = set()  # names that the losses depend on; filled by `audit`
        self.recording = False
        # Set while checking: the rows whose losses are differentiated. Then the names of calls
        # where other rows have a gradient too, and of those where these rows have one.
        self.probe: Tensor | None = None
        self.leaking: set[str] = set()
        self.reached: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a call, intercepted when it has a rule and all its parameters allow it."""
        kwargs = kwargs or {}
        bound = RULES[func].bind(args, kwargs) if func in RULES else None
        if bound is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        rule, x = bound
        learned = [tensor for tensor in (rule.weight, rule.bias) if _needs_grad(tensor)]
        names = self.names_of(rule)
        # A weight that is computed from parameters (a view, a parametrization) needs the gradient
        # that an intercepted call would not hand on.
        if not names or len(names) < len(learned) or self.left_to_autograd.intersection(names):
            return func(*args, **kwargs)
        return _InterceptedCall.apply(self, rule, x, rule.weight, rule.bias)

    def names_of(self, rule: Rule) -> list[str]:
        """Return the names of the tracked parameters that are a call's weight or bias."""
        return [
            self.names[id(tensor)]
            for tensor in (rule.weight, rule.bias)
            if id(tensor) in self.names
        ]

    def audit(self, losses: Tensor) -> dict[str, str]:
        """Return the parameters that must be left to autograd, each with its reason.

        Walks the graph from the losses. A parameter is safe if it is used exactly once, in an
        intercepted call whose output has one row per loss.

        Raises:
            ValueError: a reentrant checkpoint, whose inner graph cannot be walked.
        """
        uses: dict[str, list[Any]] = {}
        seen, stack = {losses.grad_fn}, [losses.grad_fn]
        while stack:
            node: Any = stack.pop()
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "activation checkpoints must not be reentrant: the parameters inside one are "
                    "hidden from the audit; got checkpoint(..., use_reentrant=True); pass "
                    "use_reentrant=False"
                )
            for parent, _ in node.next_functions:
                if parent is None:
                    continue
                name = self.names.get(id(getattr(parent, "variable", None)))
                if name is not None:
                    uses.setdefault(name, []).append(node)
                elif parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        self.used = set(uses)
        reasons = {}
        for name, nodes in uses.items():
            if name in self.left_to_autograd:
                continue
            foreign = [
                node for node in nodes
                if not hasattr(node, "rule") or name not in self.names_of(node.rule)
            ]  # fmt: skip
            if foreign:
                reasons[name] = f"used by {_call_name(foreign[0])}, which has no rule for it"
            elif len(nodes) > 1:
                reasons[name] = f"used {len(nodes)} times in one forward"
            elif nodes[0].num_rows != len(losses):
                reasons[name] = (
                    f"dim 0 of its call has {nodes[0].num_rows} rows for {len(losses)} losses"
                )
        return reasons


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _call_name(node: Any) -> str:
    """Return what a user would recognise: "addmm" for AddmmBackward0."""
    return str(node.name()).partition("Backward")[0].lower() or "a custom function"


class _InterceptedCall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        interception: Interception,
        rule: Rule,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        out = rule.forward(x, weight, bias)
        ctx.save_for_backward(x, weight)
        # The audit reads rule and num_rows from the graph's nodes.
        ctx.interception, ctx.rule, ctx.num_rows = interception, rule, len(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let some pass
            raise SecondDerivativeError
        x, weight = ctx.saved_tensors
        interception, rule = ctx.interception, ctx.rule
        if interception.probe is not None:
            names = interception.names_of(rule)
            # What is not finite is refused later, by the name of the scores that it ends in.
            if grad[~interception.probe].nan_to_num(0, 0, 0).any():
                interception.leaking.update(names)
            if grad[interception.probe].any():
                interception.reached.update(names)
        elif interception.recording:
            for parameter, add_score in (
                (rule.weight, lambda s: rule.add_weight_score(s, x, grad, interception.power)),
                (rule.bias, lambda s: rule.add_bias_score(s, grad, interception.power)),
            ):
                name = interception.names.get(id(parameter))
                if name is not None:
                    add_score(interception.scores[name])
        grad_x = rule.input_grad(x, weight, grad) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, None, None
