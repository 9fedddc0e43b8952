"""Catches the calls where tracked parameters meet the data.

`Interception` is a torch function mode. While it is active a call with an operand that comes from
tracked parameters alone (the parameter, a view of it, ``1 + weight``; see operands.py) runs inside
an autograd function, whose backward hands the call's input and gradient to an observer instead of
computing the weight's own gradient. The operand is cut from the graph: whatever path to a parameter
is left belongs to a call that was not caught, and the audit finds it.

How eagerly a parameter is caught is its level:

- `EAGER`: at the first call with another tensor or another shape, such as an embedding of tokens;
- `LATER`: not where it meets nothing but other parameters and constants, as in LoRA's
  ``W + B @ A``, which is an operand itself;
- `LAZY`: only where it meets a tensor that has a gradient of its own. A table of positions that is
  looked up once for the whole batch is then an operand itself, of the addition to the tokens;
- `NEVER`: left to autograd, and scored one sample at a time.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishfast.fisher.engine.operands import Operand, Tracker, is_opaque, tensors_in
from fishfast.fisher.engine.origins import Origins
from fishfast.fisher.engine.rules import (
    BROADCASTING,
    RULES,
    BroadcastRule,
    LinearRule,
    Rule,
    autocast_input,
)

__all__ = ["EAGER", "LATER", "LAZY", "NEVER", "Interception", "SecondDerivativeError"]

EAGER, LATER, LAZY, NEVER = 0, 1, 2, 3
_NONE: frozenset[str] = frozenset()

# Called with an intercepted call's node, its input and the gradient of its output.
Observer = Callable[[Any, Any, Tensor], None]


class SecondDerivativeError(RuntimeError):
    """A loss takes a gradient with create_graph=True, and no rule has a second derivative."""


class Interception(TorchFunctionMode):
    """Intercepts calls that use tracked parameters.

    Args:
        parameters: the tracked parameters by name.

    Attributes:
        tracker: which tensors come from them.
        levels: how eagerly each one is caught, by name.
        anchor: a leaf that every intercepted call depends on; a backward to it runs them all.
        observe: called in the backward of every intercepted call.
        most_rows: the largest dim 0 that an intercepted call had since this was set to 1.
        origins: knows which tensors come from the model alone; None where nobody asks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.tracker = Tracker(parameters)
        self.levels = dict.fromkeys(parameters, EAGER)
        self.anchor = torch.zeros((), requires_grad=True)
        self.observe: Observer | None = None
        self.most_rows = 1
        self.origins: Origins | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a call, intercepted where tracked parameters meet the data."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)  # in vmap or torch.func.grad, autograd is left alone
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        data, names = False, _NONE
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                if value.requires_grad:
                    sources = self._sources(value)
                    names |= sources
                    data |= not sources
            elif isinstance(value, (tuple, list, dict)):
                for tensor in tensors_in(value):
                    if tensor.requires_grad:
                        sources = self._sources(tensor)
                        names |= sources
                        data |= not sources
        if not names:
            return func(*args, **kwargs)
        if func is torch.autograd.grad and data:  # it would not find what the calls have cut off
            raise SecondDerivativeError
        opaque = any(is_opaque(tensor) for tensor in tensors_in((args, kwargs)))
        caught = None if opaque else self._caught(func, args, kwargs, data)
        if caught is not None:
            return caught
        result = func(*args, **kwargs)
        self.tracker.mark(result, frozenset() if data or opaque else names)
        return result

    def _sources(self, tensor: Tensor) -> frozenset[str]:
        """Return the parameters that a tensor is computed from, if from nothing else.

        What is left to autograd is data like any other tensor with a gradient.
        """
        names = self.tracker.sources(tensor)
        return _NONE if any(self.levels[name] == NEVER for name in names) else names

    def _caught(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], data: bool
    ) -> Tensor | None:
        """Run a call with its operands intercepted; None if there is nothing to intercept yet."""
        rule = RULES[func].bind(func, args, kwargs) if func in RULES else None
        if rule is not None:
            x_comes_from_parameters = rule.x.requires_grad and bool(self._sources(rule.x))
            if self._all_tracked(rule):
                level = self._level(rule.operands)
                # Position ids [1, T], behind token ids [B, T]: caught later, without being asked.
                for_the_whole_batch = len(rule.x) == 1 < self.most_rows
                if not rule.x.requires_grad and (level == LAZY or for_the_whole_batch):
                    return None
                if x_comes_from_parameters and (level >= LATER or for_the_whole_batch):
                    return None
                if x_comes_from_parameters:
                    rule.x = self._expanded(rule.x, rule.x.shape)
                    rule.sees_data = False
                elif self.origins is not None:
                    rule.sees_data = not self.origins.knows(rule.x)
                return self._run(rule)
            if not x_comes_from_parameters:
                return None
        if func in _MATMULS and len(args) == 2 and self._is_weight_from_the_left(*args):
            return self._run(LinearRule(F.linear, {"input": args[1].mT, "weight": args[0]})).mT
        if _writes_to(func, args, self.tracker):
            return None
        shape = _result_shape(func, args, kwargs)
        # One operand and another make a third, which meets the data later (weight / its norm).
        alone = data or sum(t.requires_grad for t in tensors_in((args, kwargs))) == 1
        if not alone or (not data and shape is None):
            return None
        reached = False

        def intercepted(value: Any) -> Any:
            nonlocal reached
            if isinstance(value, (tuple, list)) and any(True for _ in tensors_in(value)):
                return type(value)(map(intercepted, value))
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            # Where it is not known how the call sees its operand, dim 0 may be the sample.
            known = shape is not None and _expands(value, shape)
            if func is F.scaled_dot_product_attention:
                known &= value is kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            target = shape if shape is not None and known else value.shape
            later = self._level((value,)) >= LATER
            meets_nothing = not data and (target == value.shape or later)
            if not self._sources(value) or len(target) == 0 or meets_nothing:
                return value
            reached = True
            return self._expanded(value, target, data)

        args = tuple(map(intercepted, args))
        kwargs = {key: intercepted(value) for key, value in kwargs.items()}
        return func(*args, **kwargs) if reached else None

    def _is_weight_from_the_left(self, weight: Tensor, x: Tensor) -> bool:
        """Whether a product is that of a matrix of parameters and of data, with a batch dim."""
        learned = weight.requires_grad and bool(self._sources(weight))
        return learned and weight.dim() == 2 and x.dim() >= 3 and not self._sources(x)

    def _level(self, operands: tuple[Tensor | None, ...]) -> int:
        """Return the highest level of the parameters that these come from."""
        levels = (
            self.levels[name]
            for tensor in operands if tensor is not None and tensor.requires_grad
            for name in self._sources(tensor)
        )  # fmt: skip
        return max(levels, default=EAGER)

    def _all_tracked(self, rule: Rule) -> bool:
        """Whether the operands that have a gradient come from tracked parameters, one at least."""
        learned = [t for t in rule.operands if t is not None and t.requires_grad]
        return bool(learned) and all(self._sources(t) for t in learned)

    def _expanded(self, operand: Tensor, shape: torch.Size, meets_data: bool = False) -> Tensor:
        rule = BroadcastRule(operand, shape)
        rule.sees_data = meets_data
        return self._run(rule)

    def _run(self, rule: Rule) -> Tensor:
        operands = [
            self.tracker.operand(t) if t is not None and t.requires_grad else None
            for t in rule.operands
        ]
        values = [None if t is None else t.detach() for t in rule.operands]
        if rule.x is not None:
            self.most_rows = max(self.most_rows, len(rule.x))
        x = autocast_input(rule.x) if rule.in_low_precision else rule.x
        return _InterceptedCall.apply(self, rule, operands, self.anchor, x, *values)


# Python functions that hand themselves over whole, with calls inside that have rules: run from a
# copy that does not ask. Their parameters are used through F.linear inside.
def _opened(func: Any) -> Callable[..., Any]:
    inside = {**func.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(func.__code__, inside, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


_OPENED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_SHAPE_BY_ARGUMENTS = {
    torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to, torch.Tensor.broadcast_to,
}  # fmt: skip


def _result_shape(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Size | None:
    """Return the shape to which a call broadcasts its operands; None where that is not known."""
    if func is F.scaled_dot_product_attention:  # position biases come as its mask
        query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
        return torch.Size((*query.shape[:-1], key.shape[-2]))
    if func in _SHAPE_BY_ARGUMENTS:
        return func(args[0].detach(), *args[1:], **kwargs).shape
    if func in BROADCASTING:
        return _broadcast([t.shape for t in tensors_in((args, kwargs))])
    return None


def _broadcast(shapes: list[torch.Size]) -> torch.Size | None:
    """Return the common shape; torch's own function makes tensors, and imports sympy."""
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for dim, size in enumerate(reversed(shape), start=1):
            if size != 1 and result[-dim] != size:
                if result[-dim] != 1:
                    return None
                result[-dim] = size
    return torch.Size(result)


def _expands(tensor: Tensor, shape: torch.Size) -> bool:
    return _broadcast([tensor.shape, shape]) == shape


def _writes_to(func: Callable[..., Any], args: tuple[Any, ...], tracker: Tracker) -> bool:
    """Whether a call changes a tracked tensor in place."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or name.startswith("__i") or name.endswith("_")
    in_place &= not name.endswith("__") or name.startswith(("__i", "__setitem__"))
    target = args[0] if args else None
    return in_place and isinstance(target, Tensor) and bool(tracker.sources(target))


def _own(out: Tensor) -> Tensor:
    """Return a result that is no view: autograd refuses to have an in-place call on those."""
    if not out._is_view():  # F.linear with a bias folds the leading dims
        return out
    return torch.ops.aten._unsafe_view(out, out.shape) if out.is_contiguous() else out.clone()


class _InterceptedCall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        interception: Interception,
        rule: Rule,
        operands: list[Operand | None],
        anchor: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        out = _own(rule.forward(x, weight, bias))
        ctx.save_for_backward(x, weight, bias)
        # The audit reads these from the graph's nodes; `rows` is filled in before scoring.
        ctx.interception, ctx.rule, ctx.operands = interception, rule, operands
        if not rule.keeps_input:
            rule.x = None  # a checkpoint drops what is saved above, but not what a rule holds
        ctx.lead, ctx.rows = tuple(out.shape[: rule.num_lead(out if x is None else x)]), None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let some pass
            raise SecondDerivativeError
        x, *operands = ctx.saved_tensors  # a checkpointed layer runs again here, intercepted
        with torch._C.DisableTorchFunction():  # the mode has nothing to say to what follows
            if ctx.interception.observe is not None:
                ctx.interception.observe(ctx, x, grad)
            grad_x = ctx.rule.input_grad(x, operands, grad) if ctx.needs_input_grad[4] else None
        return None, None, None, None, grad_x, None, None
