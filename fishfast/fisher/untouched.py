"""Gives the model back as it was: modes, hooks, buffers; and the random state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["Buffers", "OwnRandomState", "buffers_put_back", "hooks_set_aside", "scoring_mode"]


@contextlib.contextmanager
def scoring_mode(model: nn.Module, eval_mode: bool) -> Iterator[None]:
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
        try:
            if eval_mode:
                _give_back_modes(model, modes, set())
        finally:
            for module, training in modes.items():
                module.training = training


def _give_back_modes(module: nn.Module, modes: dict[nn.Module, bool], seen: set[nn.Module]) -> None:
    """Put modules back into their modes through their own ``train()``.

    A model may do more there than set the mode: LeViT drops what it cached in eval mode, loralib
    takes its updates out of the weights again.
    """
    if module in seen:
        return
    seen.add(module)
    inside = [part for part in module.modules() if part in modes]
    wanted = {modes[part] for part in inside}
    changed = any(part.training != modes[part] for part in inside)
    if not changed:
        return
    if len(wanted) == 1 or _has_own_train(module):
        module.train(modes.get(module, module.training))
    for child in module.children():
        _give_back_modes(child, modes, seen)


def _has_own_train(module: nn.Module) -> bool:
    """Whether a module does something of its own when it changes its mode."""
    return type(module).train is not nn.Module.train or "train" in vars(module)


@contextlib.contextmanager
def hooks_set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take the tensor hooks off: they would change gradients, or get None for an intercepted one.

    The same dicts are put back, which the hooks' handles refer to.
    """
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, own in hooks:
            p._backward_hooks = own


_NO_BUFFERS: dict[str, torch.Tensor | None] = {}
_NO_NAMES: set[str] = set()


class Buffers:
    """The buffers of a model as they are now, to be put back: objects, memory and values.

    Args:
        model: whose buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        scripted = {part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)}
        self._scripted = [
            (module, dict(module.named_buffers(recurse=False))) for module in scripted
        ]
        self._modules = [
            (module, dict(module._buffers), set(module._non_persistent_buffers_set))
            if module._buffers else (module, _NO_BUFFERS, _NO_NAMES)
            for module in model.modules() if module not in scripted
        ]  # fmt: skip
        named: list[dict[str, torch.Tensor | None]] = [own for _, own, _ in self._modules]
        named += [dict(own) for _, own in self._scripted]
        buffers = {
            id(buffer): buffer
            for own in named for buffer in own.values() if buffer is not None
        }  # fmt: skip
        self._values = [(buffer, buffer.data, buffer.clone()) for buffer in buffers.values()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what was written, replaced, filled in, registered or resized since."""
        for module, buffers, non_persistent in self._modules:
            if module._buffers or buffers:
                module._buffers.clear()
                module._buffers.update(buffers)
                module._non_persistent_buffers_set = set(non_persistent)
        for module, own in self._scripted:  # their buffers are attributes of another language
            for name, buffer in own.items():
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
        for buffer, memory, value in self._values:
            if buffer.shape != memory.shape or buffer.data_ptr() != memory.data_ptr():
                buffer.data = memory
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextlib.contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    """Give a model that counts in its buffers, or replaces them, the old ones back."""
    buffers = Buffers(model)
    try:
        yield
    finally:
        buffers.put_back()


class OwnRandomState:
    """While it is entered, noise is drawn from a state of its own, which goes on at the next entry.

    Args:
        devices: those whose states are kept apart, besides the CPU.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({device.index for device in devices if device.type == "cuda"})
        self._own = self._outer = self._get()

    def _get(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._cuda)]

    def _set(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for index, state in zip(self._cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, index)

    def start_over(self) -> None:
        """Go back to the state of the last entry."""
        self._set(self._own)

    def __enter__(self) -> None:
        self._outer = self._get()
        self._set(self._own)

    def __exit__(self, *error: object) -> None:
        self._own = self._get()
        self._set(self._outer)


def _dropout(module: nn.Module) -> float:
    """Return the dropout probability that a module has of its own."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout
    return 0.0
