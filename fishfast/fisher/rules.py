"""Per-sample squared gradients of the functions through which most parameters are used.

A rule belongs to one call of one function: it runs the call, gives the gradient of its input, and
adds the squared (or absolute) gradient of every sample to the scores of its weight and bias. Dim 0
of the call's input and output is the sample; the caller makes sure of that.

With A the input, G the gradient of the output and f the square (``power=2``) or the absolute value
(``power=1``), the score of a linear layer is

    F[o, i] += sum_b f( sum_t G[b, t, o] A[b, t, i] )

and every other rule has the same form: sum over the positions of one sample first, then f, then sum
over the samples. B x |theta| values are never held: samples go through in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

__all__ = ["RULES", "Rule"]

# Per-sample gradients that are held at once: 8 MB of fp32, about a CPU's last-level cache share.
_CHUNK_ELEMENTS = 2**21


class Rule(ABC):
    """One call of a function with a weight and perhaps a bias."""

    # The function's argument names in order, by which positional arguments are found.
    arguments: tuple[str, ...]

    def __init__(self, weight: Tensor | None, bias: Tensor | None, options: dict[str, Any]) -> None:
        self.weight, self.bias, self.options = weight, bias, options

    @classmethod
    def bind(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rule, Tensor] | None:
        """Return the rule for a call and the call's input, or None if no rule is exact for it."""
        call = {**dict(zip(cls.arguments, args, strict=False)), **kwargs}
        x, weight, bias = call.pop("input"), call.pop("weight", None), call.pop("bias", None)
        return (cls(weight, bias, call), x) if cls.is_exact(x, weight, call) else None

    @staticmethod
    @abstractmethod
    def is_exact(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether dim 0 of the input can be the sample and the options are covered."""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""

    @abstractmethod
    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return the gradient of the input."""

    @abstractmethod
    def add_weight_score(self, score: Tensor, x: Tensor, grad: Tensor, power: int) -> None:
        """Add the weight's per-sample scores to ``score``."""

    @abstractmethod
    def add_bias_score(self, score: Tensor, grad: Tensor, power: int) -> None:
        """Add the bias's per-sample scores to ``score``."""


class SummedRule(Rule):
    """A rule that gives per-sample gradients as tensors, a few samples at a time."""

    @abstractmethod
    def weight_grads(self, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
        """Yield fp32 weight gradients of a few samples at a time, ``[samples, *weight.shape]``."""

    @abstractmethod
    def bias_grads(self, grad: Tensor) -> Tensor:
        """Return the fp32 bias gradient of every sample, ``[B, *bias.shape]``."""

    def add_weight_score(self, score: Tensor, x: Tensor, grad: Tensor, power: int) -> None:
        """Add the weight's per-sample scores to ``score``."""
        for grads in self.weight_grads(x, grad):
            add_samples(score, grads, power)

    def add_bias_score(self, score: Tensor, grad: Tensor, power: int) -> None:
        """Add the bias's per-sample scores to ``score``."""
        add_samples(score, self.bias_grads(grad), power)


def add_samples(score: Tensor, grads: Tensor, power: int) -> None:
    """Add ``sum_b f(grads[b])`` to ``score`` in place."""
    score += (grads.square() if power == 2 else grads.abs()).sum(0)


def _chunks(num_samples: int, elements_per_sample: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, elements_per_sample))
    for start in range(0, num_samples, step):
        yield slice(start, start + step)


class LinearRule(SummedRule):
    """``F.linear(input, weight, bias)`` with any middle dimensions."""

    arguments = ("input", "weight", "bias")

    @classmethod
    def bind(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rule, Tensor] | None:
        """Return no rule for a bias of one element either, which is broadcast."""
        bound = super().bind(args, kwargs)
        if bound is None or bound[0].bias is None or bound[0].weight is None:
            return bound
        return bound if bound[0].bias.shape == bound[0].weight.shape[:1] else None

    @staticmethod
    def is_exact(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether there is a dim besides the features that can be the sample."""
        return x.dim() >= 2 and weight is not None and weight.dim() == 2

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        return F.linear(x, weight, bias)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return ``G W``."""
        assert weight is not None
        return grad @ weight.to(grad.dtype)

    def add_weight_score(self, score: Tensor, x: Tensor, grad: Tensor, power: int) -> None:
        """With one position per sample f factors, and the batch is one matrix product."""
        if x.dim() == 2:
            g, a = grad.float(), x.float()
            g, a = (g.square(), a.square()) if power == 2 else (g.abs(), a.abs())
            score.addmm_(g.T, a)
        else:
            super().add_weight_score(score, x, grad, power)

    def weight_grads(self, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_t G[b, t, :] A[b, t, :]^T``."""
        a, g = x.float().flatten(1, -2), grad.float().flatten(1, -2)
        for chunk in _chunks(len(x), a.shape[-1] * g.shape[-1]):
            yield torch.bmm(g[chunk].transpose(1, 2), a[chunk])

    def bias_grads(self, grad: Tensor) -> Tensor:
        """Return the sum over positions."""
        return grad.float().flatten(1, -2).sum(1) if grad.dim() > 2 else grad.float()


class EmbeddingRule(Rule):
    """``F.embedding``: the rows of a token that repeats in a sample are summed before f.

    ``scale_grad_by_freq`` is not applied: it divides what the optimizer sees by counts over the
    batch, and is no part of the loss's derivative.
    """

    arguments = (
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
    )  # fmt: skip

    @staticmethod
    def is_exact(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether the lookup leaves the rows as they are."""
        return x.dim() >= 1 and options.get("max_norm") is None

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        return F.embedding(x, weight, self.options.get("padding_idx"))

    def add_weight_score(self, score: Tensor, x: Tensor, grad: Tensor, power: int) -> None:
        """Sum equal (token, sample) pairs, apply f, then sum equal tokens; both sums in order."""
        num_tokens = len(score)
        tokens, rows = x.reshape(len(x), -1), grad.float().reshape(-1, grad.shape[-1])
        samples = torch.arange(len(x), device=x.device).unsqueeze(1)
        pairs = (tokens.long() * len(x) + samples).flatten()
        padding = self.options.get("padding_idx")
        if padding is not None:
            real = tokens.flatten() != padding % num_tokens
            pairs, rows = pairs[real], rows[real]
        if len(pairs) == 0:
            return
        pairs, sums = _sum_equal(pairs, rows)
        sums = sums.square_() if power == 2 else sums.abs_()
        token, sums = _sum_equal(pairs // len(x), sums)
        score[token] += sums  # tokens are unique here

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Token ids have no gradient."""
        raise AssertionError("token ids have no gradient")

    def add_bias_score(self, score: Tensor, grad: Tensor, power: int) -> None:
        """The function has no bias."""
        raise AssertionError("F.embedding has no bias")


def _sum_equal(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unique keys, ascending, and the sum of the rows of each, added in row order."""
    keys, order = torch.sort(keys, stable=True)
    unique, lengths = torch.unique_consecutive(keys, return_counts=True)
    # segment_reduce adds each segment in order on every device: no float atomics.
    return unique, torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0)


class Conv2dRule(SummedRule):
    """``F.conv2d`` with stride, zero padding, dilation and groups."""

    arguments = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    @staticmethod
    def is_exact(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether the input has a batch dim and the padding is given in numbers."""
        return x.dim() == 4 and not isinstance(options.get("padding", 0), str)

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        return F.conv2d(x, weight, bias, **self.options)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return the transposed convolution of G."""
        assert weight is not None
        return conv2d_input(list(x.shape), weight.to(grad.dtype), grad, **self.options)

    def weight_grads(self, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_l G[b, o, l] U[b, c, l]`` with U the unfolded input, group by group."""
        assert self.weight is not None
        groups = self.options.get("groups", 1)
        shape = self.weight.shape
        window = {name: self.options.get(name, 1) for name in ("dilation", "stride")}
        positions = grad.shape[2] * grad.shape[3]
        patch = shape[1:].numel() * groups
        for chunk in _chunks(len(x), max(patch * positions, shape.numel())):
            unfolded = F.unfold(
                x[chunk].float(), shape[2:], padding=self.options.get("padding", 0), **window
            ).unflatten(1, (groups, -1))
            g = grad[chunk].float().flatten(2).unflatten(1, (groups, -1))
            yield torch.matmul(g, unfolded.transpose(2, 3)).reshape(-1, *shape)

    def bias_grads(self, grad: Tensor) -> Tensor:
        """Return the sum over positions."""
        return grad.float().sum((2, 3))


class LayerNormRule(SummedRule):
    """``F.layer_norm``; the normalised input is computed again in the backward."""

    arguments = ("input", "normalized_shape", "weight", "bias", "eps")

    @staticmethod
    def is_exact(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether there is a dim before the normalised ones."""
        return x.dim() > len(options["normalized_shape"])

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        return F.layer_norm(x, weight=weight, bias=bias, **self.options)

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return autograd's own gradient of the input."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = F.layer_norm(
                x, weight=None if weight is None else weight.detach(), **self.options
            )
        return torch.autograd.grad(out, x, grad.to(out.dtype))[0]

    def weight_grads(self, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_t G[b, t] xhat[b, t]``."""
        yield self.bias_grads(grad.float() * F.layer_norm(x.float(), **self.options))

    def bias_grads(self, grad: Tensor) -> Tensor:
        """Return the sum over positions."""
        return grad.float().reshape(len(grad), -1, *self.options["normalized_shape"]).sum(1)


class BatchNormRule(SummedRule):
    """``F.batch_norm`` with fixed statistics (eval mode), where samples do not mix."""

    arguments = (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    )  # fmt: skip

    @staticmethod
    def is_exact(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether the statistics are the running ones."""
        return not options.get("training", False) and options.get("running_mean") is not None

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        return F.batch_norm(x, weight=weight, bias=bias, **self.options)

    def _per_channel(self, values: Tensor, like: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * (like.dim() - 2))

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Return ``G weight / sqrt(var + eps)``."""
        scale = torch.rsqrt(self.options["running_var"].float() + self.options.get("eps", 1e-5))
        if weight is not None:
            scale = scale * weight
        return grad * self._per_channel(scale, grad).to(grad.dtype)

    def weight_grads(self, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
        """Yield ``sum_l G[b, c, l] xhat[b, c, l]``."""
        fixed = {name: self.options[name].float() for name in ("running_mean", "running_var")}
        xhat = F.batch_norm(x.float(), eps=self.options.get("eps", 1e-5), **fixed)
        yield self.bias_grads(grad.float() * xhat)

    def bias_grads(self, grad: Tensor) -> Tensor:
        """Return the sum over positions."""
        return grad.float().flatten(2).sum(2) if grad.dim() > 2 else grad.float()


RULES: dict[Callable[..., Any], type[Rule]] = {
    F.linear: LinearRule,
    F.embedding: EmbeddingRule,
    F.conv2d: Conv2dRule,
    F.layer_norm: LayerNormRule,
    F.batch_norm: BatchNormRule,
}
