"""Compact parameters: how k values of a frozen weight are trained.

A masked weight W is frozen. Next to it, on the same module, a `CompactParameter`
(`fishfast.training.values.masters`) holds its k selected values as fp32 masters; a `Target`
(`fishfast.training.values.target`) says where in W they go. The module gets a per-instance subclass
of its class, in which gradients find their way to them: by a property (`weight_tap`), and in known
layers by a forward (`layers`).
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.training.gradient.layers import move, own_forward
from fishfast.training.gradient.weight_tap import tapped_property
from fishfast.training.values.masters import CompactParameter, given_target
from fishfast.training.values.retired import VALUES_SUFFIX, say_replaced
from fishfast.training.values.sync import settle, take_weights, watch_optimizers, write
from fishfast.training.values.target import Target

__all__ = [
    "VALUES_SUFFIX",
    "CompactParameter",
    "compact_parameters",
    "tap",
    "untap",
]


class _TappedModule(nn.Module):
    """What a module with masked weights does differently. Mixed in before the module's class."""

    _masked: dict[str, Target]  # parameter name -> target

    def register_parameter(self, name: str, param: Any) -> None:
        """Keep masked weights from ``module.weight = None``."""
        if param is None and name in self._masked:
            raise RuntimeError(
                f"the masked weight {self._masked[name].name!r} must be a tensor; got None; "
                "release() before taking it away"
            )
        super().register_parameter(name, param)

    def _without_compact(self, call: Callable[[], Any]) -> Any:
        """Run something that must see the base parameters only."""
        names = [name + VALUES_SUFFIX for name in self._masked]
        held = {name: self._parameters.pop(name) for name in names if name in self._parameters}
        try:
            return call()
        finally:
            self._parameters.update(held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the module, but stay fp32: `model.to(bfloat16)` must not round the masters."""
        base_apply = super()._apply
        _settle_all(self)
        for target in self._masked.values():
            target.tap = None  # it holds the old memory
        agreed = [target for target in self._masked.values() if target.agrees()]
        result = self._without_compact(lambda: base_apply(fn, recurse))
        for name, target in self._masked.items():
            values = self._parameters[name + VALUES_SUFFIX]
            if values is not None:
                values.data = _moved(values.data, fn)
                if isinstance(values, CompactParameter):
                    values.mark_written()
                if values.grad is not None:
                    values.grad.data = _moved(values.grad.data, fn)
            weight = self._parameters.get(name)
            if weight is not None:
                move(target, weight.device)
        for target in agreed:
            if target.is_whole():  # else a tied one is in pieces until its other owners moved
                target.mark_seen(target.weight())
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the base model's keys only."""
        _settle_all(self)
        # Taken out of the result, not out of the module: another thread may be training it.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._masked:
            destination.pop(prefix + name + VALUES_SUFFIX, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Load the base model's keys and take the weights as they are; then values, if there are.

        Values are in a dict of what requires grad, such as a checkpoint of the trained part alone.
        """
        base_load = super()._load_from_state_dict
        self._without_compact(
            lambda: base_load(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
        )
        for name, target in self._masked.items():
            values = self._parameters[name + VALUES_SUFFIX]
            if not isinstance(values, CompactParameter):
                continue
            # With assign=True a tied weight is in pieces here; the next step names that.
            if prefix + name in state_dict and target.is_whole():
                take_weights(values)
            key = prefix + name + VALUES_SUFFIX
            if (given := state_dict.get(key)) is None:
                continue
            if key in unexpected:
                unexpected.remove(key)
            if given.shape != values.shape:
                errors.append(
                    f"size mismatch for {key}: copying values of shape {tuple(given.shape)}, the "
                    f"mask has {tuple(values.shape)}; were they saved with another mask?"
                )
                continue
            with torch.no_grad():
                values.copy_(given)
            if target.is_whole():
                write([values])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy through the base class: the tapped class is made again."""
        _settle_all(self)
        names, plain = tuple(self._masked), _plain_class(self)
        if "__reduce__" in _names_above_module(plain):  # torch.fx's GraphModule
            with _as_own_class(self) as held:
                function, (attributes, *others), *_ = self.__reduce_ex__(protocol)
                without = {**attributes, "_parameters": dict(self._parameters)}
            return _rebuild_reduced, (names, function, (without, *others)), held
        reduced: Any = super().__reduce_ex__(max(2, protocol))  # 0 and 1 would name the class
        function, args, *rest = reduced
        if function is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            return _rebuild_module, (plain, names), *rest
        return function, args, *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or copy: the values, which come as plain parameters, get their targets."""
        super().__setstate__(state)
        _give_targets(self)

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which compiles a module by its class."""
        name = next(iter(self._masked.values())).name
        raise RuntimeError(
            f"torch.jit.script needs plain modules; {name!r} has a mask; call release() first, or "
            "script within a with tuned.released() block"
        )


def _settle_all(module: _TappedModule) -> None:
    for name in module._masked:
        settle(module._parameters.get(name + VALUES_SUFFIX))


def _moved(values: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = fn(values)
    return moved if moved.dtype == values.dtype else values.to(moved.device)


def _refuse_quantization(module: Any, qconfig: Any) -> None:
    """Refuse torch's quantization, which sets this attribute, then passes by classes like ours."""
    name = next(iter(module._masked.values())).name
    raise RuntimeError(
        f"quantization needs plain modules, by their exact classes; {name!r} has a mask; call "
        "release() first"
    )


def _flat_weights(module: Any) -> list[Any]:
    # nn.LSTM and its kin keep references to their weights in a list, past any attribute access.
    return [getattr(module, name, None) for name in module._flat_weights_names]


@functools.cache
def _tapped_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    namespace: dict[str, Any] = {name: tapped_property(name) for name in names}
    namespace["qconfig"] = property(None, _refuse_quantization)
    if issubclass(base, nn.RNNBase):
        namespace["_flat_weights"] = property(_flat_weights, lambda module, weights: None)
    if "weight" in names and (forward := own_forward(base)):
        namespace["forward"] = forward
    above = _names_above_module(base)
    if "__deepcopy__" in above:
        namespace["__deepcopy__"] = _deepcopied
    if "__reduce__" in above:
        namespace["__setstate__"] = _put_back
    if "recompile" in above:  # of a GraphModule, which writes its forward into its class
        namespace["recompile"] = _recompiled
    # repr, error messages and torch.compile show the module's own class name.
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return types.new_class(
        base.__name__, (_TappedModule, base), {}, lambda ns: ns.update(namespace)
    )


def _names_above_module(cls: Any) -> set[str]:
    """Return what a class defines itself or inherits, but not from `nn.Module`."""
    own = (c for c in cls.__mro__ if c not in nn.Module.__mro__ and c is not _TappedModule)
    return {name for c in own for name in vars(c)}


@contextlib.contextmanager
def _as_own_class(module: Any) -> Iterator[dict[str, Any]]:
    """Show a module to its own class's code for copies: no mask, no compact parameters.

    Yields:
        What was taken out, for `_put_back`.
    """
    tapped, masked = type(module), module._masked
    module.__class__ = _plain_class(module)
    del module._masked
    names = [name + VALUES_SUFFIX for name in masked]
    held = {"masked": masked, "values": {n: module._parameters.pop(n) for n in names}}
    try:
        yield held
    finally:
        module.__class__ = tapped
        _put_back(module, held)


def _put_back(module: Any, held: dict[str, Any]) -> None:
    module._masked = held["masked"]
    module._parameters.update(held["values"])
    _give_targets(module)


def _give_targets(module: _TappedModule) -> None:
    for name, target in module._masked.items():
        values = module._parameters.get(name + VALUES_SUFFIX)
        if type(values) is nn.Parameter:  # unpickled, or copied by itself
            values = given_target(values, target)
        weight = module._parameters.get(name)
        if isinstance(values, CompactParameter) and weight is not None and not target.has_seen:
            target.mark_seen(weight)  # they were settled before they were copied
    watch_optimizers()


def _deepcopied(module: Any, memo: dict[int, Any]) -> Any:
    """Copy a module whose class copies itself, such as torch.fx's GraphModule."""
    _settle_all(module)
    with _as_own_class(module) as held:
        copied = copy.deepcopy(module, memo)
    for values in held["values"].values():
        other = copy.deepcopy(values, memo)
        tap(other.target, other)
    return copied


def _recompiled(module: Any) -> Any:
    with _as_own_class(module):
        return module.recompile()


def _rebuild_reduced(names: tuple[str, ...], function: Any, args: Any) -> nn.Module:
    module = function(*args)
    module.__class__ = _masked_class(type(module), names)
    return module


def _tapped_below(module: nn.Module) -> Any:
    """Return a module's tapped class, which a later parametrization has put another one upon."""
    return next(cls for cls in type(module).__mro__ if _TappedModule in cls.__bases__)


def _plain_class(module: nn.Module) -> Any:
    tapped = _tapped_below(module)
    return _rebased(type(module), tapped, tapped.__bases__[1])


def _masked_class(cls: Any, names: tuple[str, ...]) -> Any:
    """Return a plain class with the tap, below torch's class of a module with parametrizations.

    torch takes a parametrization off the topmost class and expects that to be its own.
    """
    base = next(c for c in cls.__mro__ if c.__module__ != nn.utils.parametrize.__name__)
    return _rebased(cls, base, _tapped_class(base, names))


def _rebased(cls: Any, below: type, other: type) -> Any:
    """Return a class like this one, but derived from another in the place of one below it."""
    if cls is below:
        return other
    bases = tuple(_rebased(b, below, other) if issubclass(b, below) else b for b in cls.__bases__)
    made_anew = ("__dict__", "__weakref__")  # by type() for every class
    own = {name: found for name, found in vars(cls).items() if name not in made_anew}
    return type(cls)(cls.__name__, bases, own)


def _rebuild_module(plain: Any, names: tuple[str, ...]) -> nn.Module:
    cls = _masked_class(plain, names)
    return cls.__new__(cls)


def tap(target: Target, values: CompactParameter | None = None) -> CompactParameter:
    """Register a compact parameter beside a weight and route the weight's gradient to it.

    Args:
        target: the weight's owners and the selected indices.
        values: the compact parameter of this target; default: a new one of the weight's values.

    Returns:
        The compact parameter, on every owner under the weight's name + ``_values``.
    """
    if values is None:
        values = CompactParameter(target.gather().float(), target)
        target.mark_seen(target.weight(), with_bits=True)
    target.values = values
    for module, name in target.owners:
        tapped = isinstance(module, _TappedModule)
        plain = _plain_class(module) if tapped else type(module)
        masked: dict[str, Target] = module._masked if tapped else {}  # type: ignore[assignment]
        masked[name] = target
        module.__class__ = _masked_class(plain, tuple(masked))
        module._masked = masked  # type: ignore[assignment]
        module.register_parameter(name + VALUES_SUFFIX, values)
    move(target, target.indices.device)
    watch_optimizers()
    return values


def untap(model: nn.Module) -> None:
    """Give every module its own class back and drop the compact parameters."""
    tapped = [module for module in model.modules() if isinstance(module, _TappedModule)]
    plain = [_plain_class(module) for module in tapped]  # all before anything is changed
    for module in tapped:
        _settle_all(module)
    for module, cls in zip(tapped, plain, strict=True):
        for name, target in module._masked.items():
            target.tap = None
            module._parameters.pop(name + VALUES_SUFFIX, None)
        module.__class__ = cls
        del module._masked


def compact_parameters(model: nn.Module) -> Iterator[tuple[str, CompactParameter]]:
    """Yield (name, parameter) for each compact parameter of a model, each once.

    Raises:
        RuntimeError: something else is in the place of one.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, _TappedModule):
            continue
        expected = {name + VALUES_SUFFIX: target for name, target in module._masked.items()}
        for name, parameter in module._parameters.items():
            if isinstance(parameter, CompactParameter):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{prefix}.{name}" if prefix else name, parameter
            elif name in expected and parameter is not None:
                raise RuntimeError(say_replaced(expected[name], parameter))
