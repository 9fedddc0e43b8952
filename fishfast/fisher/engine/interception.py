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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishfast.fisher.engine.hooks import TensorHook, TensorHooks
from fishfast.fisher.engine.operands import MARK, Operand, Tracker, is_opaque, tensors_in
from fishfast.fisher.engine.origins import Origins
from fishfast.fisher.engine.rules import (
    RULES,
    BroadcastRule,
    LinearRule,
    Rule,
    autocast_input,
)
from fishfast.fisher.engine.shapes import expands, result_shape
from fishfast.fisher.engine.sites import EAGER, LATER, LAZY, NEVER, Sites, records
from fishfast.fisher.engine.small_calls import SmallCalls

__all__ = [
    "EAGER", "LATER", "LAZY", "NEVER", "Interception", "Observer", "SecondDerivativeError",
]  # fmt: skip

_NONE: frozenset[str] = frozenset()

# Called with an intercepted call's node, its input and the gradient of its output.
Observer = Callable[[Any, Any, Tensor], None]


class SecondDerivativeError(RuntimeError):
    """A loss or a hook takes a gradient that a cut graph, or a rule, does not have."""


class Interception(TorchFunctionMode):
    """Intercepts calls that use tracked parameters.

    Args:
        parameters: the tracked parameters by name.

    Attributes:
        tracker: which tensors come from them.
        levels: how eagerly each one is caught, by name.
        anchor: a leaf that every intercepted call depends on; a backward to it runs them all.
        observe: called in the backward of every intercepted call.
        task: autograd's number of that backward, by which those inside it are told apart.
        hooks: those that the forward has put on its tensors.
        most_rows: the largest dim 0 that an intercepted call of this forward had.
        small_calls: how often each weight was caught, and which are caught no more.
        origins: knows which tensors come from the model alone; None where nobody asks.
        hooked_late: a hook is on what is computed from a parameter, which may be caught by then.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.tracker = Tracker(parameters)
        self.levels = dict.fromkeys(parameters, EAGER)
        self.anchor = torch.zeros((), requires_grad=True)
        self.observe: Observer | None = None
        self.sites = Sites(self.tracker)
        self.task = -1
        self.hooks = TensorHooks()
        self.most_rows = 1
        self._one_row: dict[Any, bool] = {}
        self.small_calls = SmallCalls()
        self.origins: Origins | None = None
        self.hooked_late = False

    def begin(self) -> None:
        """Forget what an earlier forward has left; see what torch's functions call by now."""
        self.hooked_late = False
        for func, inside in _INSIDE:
            inside |= func.__globals__ | _ASK_NOBODY
        self.most_rows = 1
        self._one_row.clear()
        self.small_calls.clear()
        self.hooks.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a call, intercepted where tracked parameters meet the data."""
        kwargs = kwargs or {}
        if func in _FACTS:
            return func(*args, **kwargs)
        if func in RULES and self.origins is None:
            again = self.sites.rule(func, args, kwargs, self.levels)
            if again is not None:  # nearly always
                return self._run(again[0], True, again[1])
        elif func in _LOOKED_FOR:
            if func is torch.Tensor.register_hook:
                return self._hooked(*args, **kwargs)
            if func is torch.autograd.grad and self.task != -1:  # in a hook of the backward
                return self._grad_in_backward(args, kwargs)
            if func in _OPENED and records():
                with self:
                    return _OPENED[func](*args, **kwargs)
        data, names = False, _NONE
        parameters = self.tracker.alone
        for value in (*args, *kwargs.values()) if kwargs else args:
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter or isinstance(value, Tensor):
                if not value.requires_grad:
                    continue
                if id(value) not in parameters and getattr(value, MARK, None) is None:
                    data = True  # most tensors: as `_sources` says, for less
                    continue
                sources = self._sources(value)
                names |= sources
                data |= not sources
            elif kind is not int and isinstance(value, (tuple, list, dict)):
                for tensor in tensors_in(value):
                    if tensor.requires_grad:
                        sources = self._sources(tensor)
                        names |= sources
                        data |= not sources
        if not names or not records():
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

    def _hooked(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> TensorHook:
        if self.tracker.name(tensor) is not None:  # hooks on parameters do not run while scoring
            return TensorHook(hook)
        if sources := self._sources(tensor):  # it is to see each sample's own gradient
            why = dict.fromkeys(sources, "a hook is on a tensor that is computed from it")
            self.small_calls.given_up.update(why)
            self.levels.update(dict.fromkeys(sources, NEVER))
            self.hooked_late = True  # perhaps after it was used
        return self.hooks.register(tensor, hook)

    def _grad_in_backward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        if any(self._sources(tensor) for tensor in tensors_in(inputs)):
            raise SecondDerivativeError
        with self:  # a checkpointed layer runs again in there
            return _GRAD(*args, **kwargs)

    def _sources(self, tensor: Tensor) -> frozenset[str]:
        """Return the parameters that a tensor is computed from, if from nothing else.

        What is left to autograd is data like any other tensor with a gradient.
        """
        names = self.tracker.sources(tensor)
        if names and any([self.levels[name] == NEVER for name in names]):
            return _NONE
        return names

    def _caught(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], data: bool
    ) -> Tensor | None:
        """Run a call with its operands intercepted; None if there is nothing to intercept yet."""
        rule = RULES[func].bind(func, args, kwargs) if func in RULES else None
        if rule is not None and rule.only_data and self._sources(rule.x):
            rule = None
        if rule is not None:
            operands = self._parameters(rule)
            in_the_midst = rule.x.requires_grad and self.origins is None
            if operands is not None and in_the_midst and not self._sources(rule.x):
                self.sites.remember(func, args, kwargs, rule, operands)
                return self._run(rule, True, operands)
            x_comes_from_parameters = rule.x.requires_grad and bool(self._sources(rule.x))
            if self._all_tracked(rule):
                level = self._level(rule.operands)
                # Position ids [1, T], behind token ids [B, T]: caught later, without being asked.
                for_the_whole_batch = self._is_one_row(rule)
                if not rule.x.requires_grad and (level == LAZY or for_the_whole_batch):
                    return None
                if x_comes_from_parameters and (level >= LATER or for_the_whole_batch):
                    return None
                if x_comes_from_parameters:
                    rule.x = self._expanded(rule.x, rule.x.shape, data)
                    rule.sees_data = False
                return self._run(rule, data)
            if not x_comes_from_parameters:
                return None
        if func in _MATMULS and len(args) == 2 and self._is_weight_from_the_left(*args):
            rule = LinearRule(F.linear, {"input": args[1].mT, "weight": args[0]})
            return self._run(rule, data).mT
        if _writes_to(func, args, self.tracker):
            return None
        shape = result_shape(func, args, kwargs)
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
            known = shape is not None and expands(value, shape)
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

    def _is_one_row(self, rule: Rule) -> bool:
        """Whether a call has one row, behind calls of more; a checkpoint hears it again."""
        names = tuple(name for t in rule.operands if t is not None for name in self._sources(t))
        key = (names, rule.x.shape)
        if key not in self._one_row:
            self._one_row[key] = rule.x.shape[0] == 1 < self.most_rows
        return self._one_row[key]

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

    def _expanded(self, operand: Tensor, shape: torch.Size, data: bool) -> Tensor:
        rule = BroadcastRule(operand, shape)
        rule.sees_data = data
        return self._run(rule, data)

    def _parameters(self, rule: Rule) -> list[Operand | None] | None:
        """Return the operands of a call whose weight and bias are parameters as they are."""
        operands: list[Operand | None] = []
        for tensor in rule.operands:
            if tensor is None or not tensor.requires_grad:
                operands.append(None)
                continue
            operand = self.tracker.whole(tensor)
            if operand is None or self.levels[operand.names[0]] == NEVER:
                return None
            operands.append(operand)
        return operands if any(operands) else None

    def _run(self, rule: Rule, data: bool, operands: list[Operand | None] | None = None) -> Tensor:
        rule.meets_data = data
        if self.origins is not None and rule.x is not None and rule.sees_data:
            rule.sees_data = not self.origins.knows(rule.x)
        if operands is None:
            operands = [
                self.tracker.operand(t) if t is not None and t.requires_grad else None
                for t in rule.operands
            ]
        for name in self.small_calls.note(rule, operands):
            self.levels[name] = NEVER
        x = rule.x
        autocast = _any_autocast()
        if x is not None:
            self.most_rows = max(self.most_rows, x.shape[0])
            x = autocast_input(x) if autocast and rule.in_low_precision else x
        # Autocast keeps what it casts of a parameter, and would keep it without a gradient.
        values = [
            t if t is None or (t.is_leaf and not autocast) else t.detach() for t in rule.operands
        ]
        return _apply(_Call(self, rule, operands, values), self.anchor, x)


class _Call(NamedTuple):
    """What the autograd function of a call gets besides its tensors."""

    interception: Interception
    rule: Rule
    operands: list[Operand | None]
    values: list[Tensor | None]


# True where it cannot be asked.
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


# Python functions that hand themselves over whole, with calls inside that have rules: run from a
# copy that does not ask. Their parameters are used through F.linear inside.
def _opened(func: Any) -> Callable[..., Any]:
    inside = func.__globals__ | _ASK_NOBODY
    _INSIDE.append((func, inside))
    copy = types.FunctionType(func.__code__, inside, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


_ASK_NOBODY = {"has_torch_function": lambda *_: False}
_INSIDE: list[tuple[Any, dict[str, Any]]] = []  # functions and the globals of their copies
_OPENED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}
_GRAD = _opened(torch.autograd.grad)
_LOOKED_FOR = {torch.Tensor.register_hook, torch.autograd.grad, *_OPENED}
# What a tensor is asked: the answer is none.
_FACTS = {
    getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_cuda", "is_leaf",
    )
} | {
    getattr(Tensor, name) for name in (
        "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__",
    )
}  # fmt: skip
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


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
    return out.data if out.is_contiguous() else out.clone()


class _InterceptedCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, x: Tensor | None) -> Tensor:
        rule, (weight, bias) = call.rule, call.values
        out = _own(rule.forward(x, weight, bias))
        ctx.save_for_backward(x, weight)
        # The audit reads these from the graph's nodes; `rows` is filled in before scoring.
        ctx.interception, ctx.rule, ctx.operands = call.interception, rule, call.operands
        if not rule.keeps_input:
            rule.x = None  # a checkpoint drops what is saved above, but not what a rule holds
        ctx.lead, ctx.rows = tuple(out.shape[: rule.num_lead(out if x is None else x)]), None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let some pass
            raise SecondDerivativeError
        x, weight = ctx.saved_tensors  # a checkpointed layer runs again here, intercepted
        with torch._C.DisableTorchFunction():  # the mode has nothing to say to what follows
            outer = torch._C._current_graph_task_id() == ctx.interception.task
            if ctx.interception.observe is not None and outer:
                ctx.interception.observe(ctx, x, grad)
            # Where an inner backward adds to leaves, such as parameters, it adds to this one too.
            grad_anchor = None if outer else torch.zeros(())
            grad_x = ctx.rule.input_grad(x, weight, grad) if ctx.needs_input_grad[2] else None
        return None, grad_anchor, grad_x


# What Function.apply calls after asking for vmap and for default arguments, which are not here.
_apply = super(torch.autograd.Function, _InterceptedCall).apply
