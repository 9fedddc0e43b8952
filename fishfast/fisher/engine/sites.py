"""Calls that a model makes again with the same parameters: what was found out about them.

Of a layer in the midst of a model only the input changes from call to call. Then the rule that was
bound the first time is bound again without looking: for less than the call itself costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishfast.fisher.engine.operands import Operand, Tracker
from fishfast.fisher.engine.rules import RULES, Rule

__all__ = ["EAGER", "LATER", "LAZY", "NEVER", "Sites", "records"]

# Levels of a parameter: how eagerly it is caught. NEVER: it is left to autograd.
EAGER, LATER, LAZY, NEVER = range(4)


class _Site(NamedTuple):
    """A call, but for its input.

    Attributes:
        func: the function.
        place: of the input among the positional arguments.
        others: the other positional arguments, then those by keyword. The objects are compared.
        keywords: their names.
        num_dims: of the input.
        dtype: of the input.
        kind: of the rule.
        state: the rule's attributes.
        operands: the parameters.
        names: theirs.
    """

    func: Callable[..., Any]
    place: int
    others: tuple[Any, ...]
    keywords: tuple[str, ...]
    num_dims: int
    dtype: torch.dtype
    kind: type[Rule]
    state: dict[str, Any]
    operands: list[Operand | None]
    names: tuple[str, ...]


class Sites:
    """The calls seen so far whose weight is a tracked parameter as it is.

    Args:
        tracker: the tracked parameters.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._by_weight: dict[int, _Site] = {}  # by the identity of an object that the site holds

    def rule(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        levels: Mapping[str, int],
    ) -> tuple[Rule, list[Operand | None]] | None:  # fmt: skip
        """Return the rule of a call like one before, and its operands; None for any other.

        Args:
            func: has a rule.
            args: of the call.
            kwargs: of the call.
            levels: of the parameters, by name.
        """
        site = self._by_weight.get(id(RULES[func].weight_of(args, kwargs)))
        if site is None or func is not site.func:
            return None
        place = site.place
        others = args[1:] if place == 0 else (*args[:place], *args[place + 1 :])
        if kwargs:
            others += tuple(kwargs.values())
        if len(others) != len(site.others) or not all(map(is_, others, site.others)):
            return None
        x = args[place]
        if (
            type(x) is not Tensor or x.is_nested or not x.requires_grad or x.dim() != site.num_dims
            or x.dtype is not site.dtype or self._tracker.sources(x)
            or x.layout is not torch.strided or tuple(kwargs) != site.keywords or not records()
        ):  # fmt: skip
            return None
        for name in site.names:
            if levels[name] >= NEVER:
                return None
        for operand in site.operands:  # frozen for this call, as a discriminator is
            if operand is not None and not operand.tensor.requires_grad:
                return None
        rule = site.kind.__new__(site.kind)
        rule.__dict__.update(site.state)
        rule.x = x
        return rule, site.operands

    def remember(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rule: Rule,
        operands: list[Operand | None],
    ) -> None:  # fmt: skip
        """Remember a call whose input is data with a gradient.

        Args:
            func: has a rule.
            args: of the call.
            kwargs: of the call.
            rule: bound to the call, before it ran.
            operands: its parameters.
        """
        place = next((place for place, value in enumerate(args) if value is rule.x), None)
        if place is None:
            return
        others = (*args[:place], *args[place + 1 :], *kwargs.values())
        known = [operand.tensor for operand in operands if operand is not None]
        if any(isinstance(v, Tensor) and not any(v is t for t in known) for v in others):
            return  # an argument made for this call alone
        if any(isinstance(v, list) for v in others):
            return  # the same object may hold something else by then
        state = {**rule.__dict__, "x": None}
        names = tuple(operand.names[0] for operand in operands if operand is not None)
        self._by_weight[id(RULES[func].weight_of(args, kwargs))] = _Site(
            func, place, others, tuple(kwargs), rule.x.dim(), rule.x.dtype, type(rule), state,
            operands, names,
        )  # fmt: skip


def records() -> bool:
    """Whether autograd records calls, outside vmap and torch.func, where it is left alone."""
    return torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
