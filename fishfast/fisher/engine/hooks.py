"""The hooks that a forward puts on its tensors: every backward finds them as the forward did.

A model's own backward runs once. Here several run over one graph, and a hook that takes itself off
(deep equilibrium models do, before they solve for their gradient) must be there in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["TensorHook", "TensorHooks"]


class TensorHook:
    """A hook on a tensor, and the handle that takes it off."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        self.hook, self.removed = hook, False

    def __call__(self, grad: Tensor) -> Any:
        """Run the hook unless it was taken off."""
        return None if self.removed else self.hook(grad)

    def remove(self) -> None:
        """Take the hook off, for the rest of the forward or of this backward."""
        self.removed = True

    def __enter__(self) -> TensorHook:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class TensorHooks:
    """The hooks of one forward."""

    def __init__(self) -> None:
        self._hooks: list[tuple[TensorHook, Any]] = []

    def register(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> TensorHook:
        """Put a hook on a tensor that is no tracked parameter."""
        handle = TensorHook(hook)
        tensor.register_hook(handle)
        self._hooks.append((handle, tensor.grad_fn))
        return handle

    def clear(self) -> None:
        """Forget the hooks of an earlier forward, and its graph."""
        self._hooks = []

    def settle(self) -> list[Any]:
        """Keep the hooks that the forward has left; return the nodes that they are on."""
        self._hooks = [(handle, node) for handle, node in self._hooks if not handle.removed]
        return [node for _, node in self._hooks if node is not None]

    def rearm(self) -> None:
        """Put back what an earlier backward has taken off."""
        for handle, _ in self._hooks:
            handle.removed = False
