"""The gradient tap: a frozen weight whose gradient goes to its compact parameter.

The tap passes a weight W on as it is; its backward hands the compact parameter ``dW[indices]``. It
is a property on a per-instance subclass of the module's class, so any code that reads the attribute
is covered, and uses of the weight in several places add up. The dense dW lives for a moment;
`fishfast.training.gradient.layers` is the road on which it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fishfast.training.values.retired import VALUES_SUFFIX
from fishfast.training.values.sync import settle

__all__ = ["GradientTap", "tapped_property"]


class GradientTap(torch.autograd.Function):
    """``(W, values, indices) -> W``, whose gradient ``dW[indices]`` is that of ``values``."""

    generate_vmap_rule = True  # for torch.func: per-sample gradients of the compact parameters

    @staticmethod
    def forward(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """Return the weight."""
        return weight.detach()  # shares memory and version counter, and is no view to autograd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the indices."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        """Return the gradient of the values, in fp32."""
        (indices,) = ctx.saved_tensors
        if grad.is_sparse:  # nn.Embedding(sparse=True)
            grad = grad.to_dense()
        return None, grad.flatten().index_select(0, indices).float(), None


def tapped_property(name: str) -> property:
    """Return the attribute through which a tapped module reads its weight.

    Args:
        name: of the weight.
    """
    values_name = name + VALUES_SUFFIX

    def read(module: Any) -> Any:
        if name not in module._parameters:
            raise RuntimeError(
                f"the masked weight {module._masked[name].name!r} was taken away; call release() "
                "before a parametrization, pruning or del"
            )
        weight = module._parameters[name]
        values = module._parameters.get(values_name)
        settle(values)
        if values is None or not torch.is_grad_enabled():
            return weight
        return GradientTap.apply(weight, values, module._masked[name].indices)

    return property(read)
