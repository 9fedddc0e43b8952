"""Layers whose masked weight gradient is computed without the dense one.

A linear layer, a convolution, an embedding or transformers' Conv1D with a masked weight runs as it
is, on the plain frozen weight: autograd keeps what the gradient of its input needs and nothing
else. Its output y then passes a side tap, an autograd function that returns y itself and whose
backward gives the compact parameter its k gradients, from the input and y's gradient
(`masked_grad`). Its Python takes 50 us more than the gradient tap's, so calls whose `Plan` says
that this does not pay read the weight as an attribute, with the gradient tap. So do other modules,
subclasses with a forward of their own and any other code; a weight that both use gets both
gradients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishfast.training.gradient.chunks import Plan
from fishfast.training.gradient.kept_input import kept_columns
from fishfast.training.gradient.masked_grad import masked_grad
from fishfast.training.gradient.products import input_grad, weight_grad
from fishfast.training.gradient.weight_tap import GradientTap, has_own_values, is_traced
from fishfast.training.values.retired import VALUES_SUFFIX
from fishfast.training.values.sync import settle
from fishfast.training.values.target import Target

__all__ = ["SideTap", "has_own_forward", "move", "own_forward", "plan_for", "way"]


class SideTap(torch.autograd.Function):
    """``(y, x, kept, weight, values, ...) -> y``, whose backward gives the values their gradient.

    ``kept`` are the columns of the input x that have masked entries, and ``entries`` and what
    follows are those of a layer with this input; with None for both x is kept.
    """

    generate_vmap_rule = True  # per-sample gradients of the compact parameters

    @staticmethod
    def forward(y: Tensor, *others: Any) -> Tensor:
        """Return the layer's output."""
        return y.detach()  # no view to autograd: what follows may write into it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what there is of the layer's input."""
        _, x, kept, weight, values, indices, entries, *plan_and_constants = inputs
        positions, rows, columns, *constants = plan_and_constants
        if kept is None:
            kept, entries = x, indices
        if not ctx.needs_input_grad[1]:
            weight = values = None  # needed only where the gradient of x may be differentiated
        ctx.save_for_backward(kept, weight, values, indices, entries, positions, rows, columns)
        ctx.constants = constants

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of y, and of the values in fp32."""
        kept, weight, values, indices, entries, positions, rows, columns = ctx.saved_tensors
        kind, chunks, shape, geometry = ctx.constants
        # With create_graph=True. torch.compile traces this too, and differentiates nothing twice.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        grad_x = grad_values = None
        if ctx.needs_input_grad[4]:
            if again:
                dense = weight_grad(kind, grad, kept, shape, geometry)
                grad_values = dense.flatten().index_select(0, entries).float()
            else:
                grad_values = masked_grad(
                    kind, grad, kept, entries, positions, rows, columns, chunks, shape, geometry
                )
        if weight is not None and again:
            # The gradient of x, which the layer's own backward gives, depends on the values. The
            # added term is zero but carries the second derivative.
            tapped = GradientTap.apply(weight, values, indices)
            grad_x, as_frozen = (
                input_grad(kind, grad, kept, w, geometry) for w in (tapped, weight)
            )
            grad_x = grad_x - as_frozen
        return (grad, grad_x, None, None, grad_values, *[None] * 9)


def _apply_side_tap(*arguments: Any) -> Tensor:
    if is_traced():
        return SideTap.apply(*arguments)
    # What `apply` does in eager mode, without its 10 us of inspecting the signature.
    return super(torch.autograd.Function, SideTap).apply(*arguments)


class BiasTap(torch.autograd.Function):
    """``(y, bias, dims) -> y``, whose backward sums the gradient of a convolution's bias.

    Asked for the bias alone, torch's own backward on a CPU computes the dense weight gradient, too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, bias: Tensor, dims: int) -> Tensor:
        """Return the layer's output, of [(B,) C, positions of dims] elements."""
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep which dims are positions."""
        y, bias, dims = inputs
        ctx.dtype = bias.dtype  # fp32 under autocast
        ctx.summed = [dim for dim in range(y.dim()) if dim != y.dim() - dims - 1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of y and of the bias."""
        return grad, grad.sum(ctx.summed, dtype=ctx.dtype), None


def _side_tap(module: Any, y: Tensor, x: Tensor, kind: str, *geometry: int) -> Tensor:
    target = module._masked["weight"]
    plan = target.plan
    if plan.device != target.indices.device:  # loaded onto another device
        move(target, target.indices.device)
        plan = target.plan
    if x.is_floating_point() and x.dtype != y.dtype:
        x = x.to(y.dtype)  # autocast: kept as the layer saw it
    kept, entries, shape = None, None, tuple(target.shape)
    rows, columns = plan.rows, plan.columns
    if kind.endswith("linear") and not is_traced():
        axis = 1 if kind == "linear" else 0
        kept, entries, shape = kept_columns(target, x, axis)
        if kept is not None:
            rows, columns = (rows, None) if axis else (None, columns)
    return _apply_side_tap(
        y, x, kept, _frozen_weight(module), module._parameters["weight" + VALUES_SUFFIX],
        target.indices, entries, plan.positions, rows, columns,
        kind, plan.chunks, shape, geometry,
    )  # fmt: skip


def _frozen_weight(module: Any) -> Tensor:
    # Detached: no dense gradient even after model.requires_grad_().
    return module._parameters["weight"].detach()


def _is_dense(module: Any, x: Any, always: bool = False) -> bool:
    """Return whether this call reads the weight's attribute, as the module's own class does.

    So do calls without a gradient of the values, with odd inputs, with other values than the
    compact parameter, and those whose gradient is not worth a side tap.

    Args:
        module: with a masked weight.
        x: its input.
        always: the layer's gradient is worth it, however small the input.
    """
    plan = module._masked["weight"].plan
    if plan is None or not torch.is_grad_enabled():
        return True
    numel = x.numel()
    if not always and numel < plan.least and (numel < plan.least_traced or not is_traced()):
        return True
    values = module._parameters.get("weight" + VALUES_SUFFIX)
    if values is None or not values.requires_grad or not has_own_values(module, "weight"):
        return True
    weight = module._parameters.get("weight")
    if weight is None or weight.shape != module._masked["weight"].shape:
        return True  # the attribute's reader says so
    if x.layout != torch.strided or x.is_nested:
        return True
    if weight.requires_grad and not isinstance(weight, nn.Parameter):  # of functional_call
        return True
    settle(values)  # else the attribute's reader does
    return plan.groups != getattr(module, "groups", 1)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    if _is_dense(self, input):
        return F.linear(input, self.weight, self.bias)
    y = F.linear(input, _frozen_weight(self), self.bias)
    return _side_tap(self, y, input, "linear")


def _gpt2_forward(self: Any, x: Tensor) -> Tensor:
    plain = _is_dense(self, x)
    weight = self.weight if plain else _frozen_weight(self)
    y = torch.addmm(self.bias, x.view(-1, x.size(-1)), weight)
    y = y.view(x.size()[:-1] + (self.nf,))
    return y if plain else _side_tap(self, y, x, "transposed linear")


def _embedding_forward(self: Any, input: Tensor) -> Tensor:
    if self.scale_grad_by_freq or _is_dense(self, input, always=True):
        return nn.Embedding.forward(self, input)
    y = F.embedding(input, _frozen_weight(self), self.padding_idx, self.max_norm, self.norm_type)
    padding = -1 if self.padding_idx is None else self.padding_idx % len(self._parameters["weight"])
    return _side_tap(self, y, input, "embedding", padding)


def _for_each_dim(setting: Any, dims: int) -> tuple[int, ...]:
    """Return a stride, padding or dilation of every dim; torch takes one number for all, too."""
    given = tuple(setting) if isinstance(setting, Iterable) else (setting,)
    return given * dims if len(given) == 1 else given


def _conv_forward(
    stock: type[nn.Module], conv: Callable[..., Tensor], dims: int
) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor) -> Tensor:
        if _is_dense(self, input):
            return stock.forward(self, input)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        stride, padding, dilation = (
            _for_each_dim(setting, dims) for setting in (self.stride, padding, self.dilation)
        )
        bias = self.bias
        sums_bias = bias is not None and bias.requires_grad and input.device.type == "cpu"
        y = conv(
            input, _frozen_weight(self), bias.detach() if sums_bias else bias,
            stride, padding, dilation, self.groups,
        )  # fmt: skip
        if sums_bias:
            y = BiasTap.apply(y, bias, dims)
        return _side_tap(self, y, input, "conv", *stride, *padding, *dilation, self.groups)

    return forward


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear_forward,
    nn.Embedding: _embedding_forward,
    nn.Conv1d: _conv_forward(nn.Conv1d, F.conv1d, 1),
    nn.Conv2d: _conv_forward(nn.Conv2d, F.conv2d, 2),
    nn.Conv3d: _conv_forward(nn.Conv3d, F.conv3d, 3),
}
# Attention reads its weight and never calls it.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


def own_forward(base: type[nn.Module]) -> Callable[..., Tensor] | None:
    """Return the forward that a module's class has once its weight is masked.

    Args:
        base: the module's own class.

    Returns:
        None for a class whose forward is not a known one.
    """
    stock = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    if (stock.__module__, stock.__qualname__) == ("transformers.pytorch_utils", "Conv1D"):
        return _gpt2_forward
    if issubclass(base, _NEVER_CALLED):
        return None
    if getattr(base, "_conv_forward", None) is not getattr(stock, "_conv_forward", None):
        return None
    return _FORWARDS.get(stock)


def forward_of(module: nn.Module) -> Any:
    """Return the function behind a module's forward. Accelerate's hooks wrap what they find."""
    return getattr(inspect.unwrap(module.forward), "__func__", None)


def has_own_forward(module: nn.Module, name: str) -> bool:
    """Return whether calls of a tapped module may bring the gradient of this weight.

    Args:
        module: with masked weights.
        name: of one of them.
    """
    forward = forward_of(module)
    known = forward is _gpt2_forward or forward in _FORWARDS.values()
    return name == "weight" and known and not getattr(module, "scale_grad_by_freq", False)


def plan_for(target: Target, indices: Tensor) -> Plan | None:
    """Return how the gradient of a masked weight is computed, if calls of its owners bring it.

    Args:
        target: its owners are tapped.
        indices: int [k], ascending, of the masked entries, on the device to plan for.

    Returns:
        The plan; None where no owner has a forward of `own_forward`.
    """
    layers = [module for module, name in target.owners if has_own_forward(module, name)]
    if not layers:
        return None
    if all(isinstance(module, nn.Embedding) for module in layers):
        return Plan.of_tokens(indices.device)
    weight: Any = layers[0]._parameters["weight"]
    return Plan.of(
        target.shape,
        indices,
        groups=max(getattr(module, "groups", 1) for module in layers),
        inputs=max(_inputs(module) for module in layers),
        may_be_dense=weight.nbytes <= target.dense_gradient_limit,
    )


def _inputs(module: Any) -> int:
    """Return how many numbers in the input there are for each row of the layer's product."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels * math.prod(_for_each_dim(module.stride, 1))
    weight = module._parameters["weight"]
    return weight.shape[0 if forward_of(module) is _gpt2_forward else 1]


def move(target: Target, device: torch.device) -> None:
    """Keep the indices where the weight is, and plan for that device.

    Args:
        target: changed in place.
        device: where the weight is now.
    """
    target.indices = target.indices.to(device)
    if target.plan is None or target.plan.device != device:
        target.plan = plan_for(target, target.indices)


def way(target: Target) -> str:
    """Return in words how the gradient of the values is computed.

    Args:
        target: of a tuned model.
    """
    ways = {_way(target, module, name) for module, name in target.owners}
    return "; ".join(sorted(ways))


def _way(target: Target, module: nn.Module, name: str) -> str:
    if target.plan is None or not has_own_forward(module, name):
        return "picked from the dense gradient"
    if isinstance(module, nn.Embedding):
        return "sums over the batch's tokens"
    return target.plan.in_words()
