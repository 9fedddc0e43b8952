r"""One use of a weight in a backward pass, and the sum of several uses before the square.

A use holds what a weight's per-sample gradient is made of. ``add_to`` adds

.. math:: \text{score} \mathrel{+}= \sum_b f(g_b), \qquad f = (\cdot)^2 \text{ or } |\cdot|

with :math:`g_b` the gradient of sample b, without holding all of them; ``grads`` gives them as
tensors, a few samples at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.rows import Rows

__all__ = [
    "BroadcastUse", "EmbeddingUse", "ExpertsUse", "LinearUse", "SumUse", "Use", "sum_equal",
]  # fmt: skip


class Use(ABC):
    """The gradient of one operand, sample by sample.

    Args:
        rows: which sample each row belongs to.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @abstractmethod
    def add_to(self, score: Tensor, add: Accumulator) -> None:
        """Add the f's of all samples to ``score``, of the operand's shape, in place."""

    @abstractmethod
    def grads(self) -> Iterator[Tensor]:
        """Yield fp32 gradients of a few samples at a time, ``[samples, *operand.shape]``."""


class LinearUse(Use):
    """``sum_t G[b, t, :] A[b, t, :]^T``; transposed where the weight is ``[I, O]``."""

    def __init__(self, rows: Rows, grad: Tensor, x: Tensor, transposed: bool = False) -> None:
        super().__init__(rows)
        self.left, self.right = (x, grad) if transposed else (grad, x)
        self.transposed = transposed

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return both factors as rows, and the first row and the end of each sample."""
        grad, x = (self.right, self.left) if self.transposed else (self.left, self.right)
        dtype = torch.promote_types(grad.dtype, x.dtype) if grad.dtype != x.dtype else grad.dtype
        dtype = torch.float32 if dtype == torch.float64 else dtype
        (grad, x), starts, ends = self.rows.packed(grad.to(dtype), x.to(dtype))
        grad, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, x))
        left, right = (x, grad) if self.transposed else (grad, x)
        return left, right, starts, ends

    def add_to(self, score: Tensor, add: Accumulator, bias: Tensor | None = None) -> None:
        """Add the f's of all samples to ``score [O, I]``, and those of G to ``bias [O]``."""
        if self.rows.layout is None:
            if bias is not None:
                grad = self.right if self.transposed else self.left
                SumUse(self.rows, grad, bias.shape).add_to(bias, add)
            add.add_linear(score, *self.packed())
            return
        left, right = self.left, self.right
        dtype = left.dtype
        if dtype != right.dtype or dtype == torch.float64:
            dtype = torch.promote_types(dtype, right.dtype)
            dtype = torch.float32 if dtype == torch.float64 else dtype
            left, right = left.to(dtype), right.to(dtype)
        blocks = self.rows.layout.by_sample
        lead, num_samples = self.rows.lead, self.rows.num_samples
        left, right = blocks(left, lead, num_samples), blocks(right, lead, num_samples)
        add.add_blocks(score, bias, left, right, self.transposed)

    def grads(self) -> Iterator[Tensor]:
        """Yield one sample's gradient at a time."""
        left, right, starts, ends = self.packed()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield (left[start:end].float().T @ right[start:end].float()).unsqueeze(0)


class EmbeddingUse(Use):
    """Rows of G at the token ids of a sample; a token that repeats is summed before f.

    Args:
        rows: which sample each row of the call belongs to.
        tokens: ``[N]``, int64.
        samples: ``[N]``, the sample of each.
        grad: ``[N, D]``.
        num_tokens: V.
    """

    def __init__(
        self, rows: Rows, tokens: Tensor, samples: Tensor, grad: Tensor, num_tokens: int
    ) -> None:
        super().__init__(rows)
        self.tokens, self.samples, self.grad = tokens, samples, grad
        self.num_tokens = num_tokens

    def add_to(self, score: Tensor, add: Accumulator) -> None:
        """Add the f's of all samples to ``score [V, D]``."""
        add.add_embedding(score, self.tokens, self.samples, self.grad)

    def grads(self) -> Iterator[Tensor]:
        """Yield one sample's gradient at a time."""
        for b in range(self.rows.num_samples):
            mine = self.samples == b
            full = self.grad.new_zeros((1, self.num_tokens, self.grad.shape[-1])).float()
            tokens, sums = sum_equal(self.tokens[mine], self.grad[mine].float())
            full[0, tokens] = sums
            yield full


def sum_equal(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unique keys, ascending, and the sum of the rows of each, added in row order."""
    if len(keys) == 0:
        return keys, rows
    keys, order = torch.sort(keys, stable=True)
    unique, lengths = torch.unique_consecutive(keys, return_counts=True)
    # segment_reduce adds each segment in order on every device: no float atomics.
    return unique, torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0)


class SumUse(Use):
    """A sum over positions: of G for a bias, of G times the normalised input for a norm.

    Args:
        rows: which sample each row belongs to.
        grad: ``[*lead, *positions, D]``, positions that all belong to the row.
        shape: the operand's shape, D elements.
        factors: ``(x, mean, rstd)`` broadcastable to ``grad``, or None; the last two may be None.
    """

    def __init__(
        self,
        rows: Rows,
        grad: Tensor,
        shape: torch.Size,
        factors: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    ) -> None:
        super().__init__(rows)
        self.grad, self.shape, self.factors = grad, shape, factors

    def add_to(self, score: Tensor | None, add: Accumulator, bias: Tensor | None = None) -> None:
        """Add the f's of all samples to ``score``, and those of G alone to ``bias``."""
        grad = self._by_sample(self.grad)
        if grad is None or not all(t is None or t.is_contiguous() for t in (score, bias)):
            if score is not None:
                for grads in self.grads():
                    add.add_samples(score, grads)
            if bias is not None:
                for grads in SumUse(self.rows, self.grad, bias.shape).grads():
                    add.add_samples(bias, grads)
            return
        x, mean, rstd = (
            None if t is None else self._by_sample(self._of_all_rows(t))
            for t in self.factors or (None, None, None)
        )
        score, bias = (None if t is None else t.view(-1) for t in (score, bias))
        add.add_sum(score, grad, x, mean, rstd, bias)

    def _by_sample(self, tensor: Tensor) -> Tensor | None:
        blocks = self.rows.by_sample(tensor)
        return blocks if blocks is None or blocks.dim() == 3 else blocks.flatten(1, -2)

    def _of_all_rows(self, factor: Tensor) -> Tensor:
        same = factor.shape[:-1] == self.grad.shape[:-1]
        return factor if same else factor.expand_as(self.grad)

    def grads(self) -> Iterator[Tensor]:
        """Yield all samples' gradients at once: operands of this kind are small."""
        values = self.grad.float()
        if self.factors is not None:
            x, mean, rstd = self.factors
            factor = x.float() if mean is None else x.float() - mean
            values = values * (factor if rstd is None else factor * rstd)
        inner = range(len(self.rows.lead), values.dim() - 1)
        values = values.sum(tuple(inner)) if inner else values
        yield self.rows.sums(values).view(-1, *self.shape)


class BroadcastUse(Use):
    """An operand that was expanded to the call's shape: the sum over what it was expanded along.

    Args:
        rows: which sample each row belongs to.
        grad: ``[*lead, *rest]``.
        shape: the operand's shape; broadcasts to that of ``grad``.
        own_rows: whether dim 0 of the operand counts rows itself (one slice per sample).
    """

    def __init__(self, rows: Rows, grad: Tensor, shape: torch.Size, own_rows: bool) -> None:
        super().__init__(rows)
        self.grad, self.shape, self.own_rows = grad, shape, own_rows

    def add_to(self, score: Tensor, add: Accumulator) -> None:
        """Add the f's of all samples to ``score``."""
        for grads in self.grads():
            add.add_samples(score, grads)

    def grads(self) -> Iterator[Tensor]:
        """Yield all samples' gradients at once, or one by one where each has its own slice."""
        lead = len(self.rows.lead)
        inner = self.shape[max(0, len(self.shape) - (self.grad.dim() - lead)) :]
        grad = self.grad.float()
        if not self.own_rows:
            # Sum the dims behind the rows first: fewer elements to order by sample.
            grad = grad.sum_to_size(*grad.shape[:lead], *_padded(inner, grad.dim() - lead))
            yield self.rows.sums(grad).view(-1, *self.shape)
            return
        grad = grad.sum_to_size(*grad.shape[:lead], *inner)
        samples = self.rows.samples(grad.device).view(-1, *[1] * len(inner))
        for b in range(self.rows.num_samples):
            yield torch.where(samples == b, grad, 0.0).unsqueeze(0)


def _padded(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    return (*(1,) * (dims - len(shape)), *shape)


class ExpertsUse(Use):
    """A stack of weights ``[E, I, O]``, each with rows of its own.

    Args:
        rows: which sample each row belongs to, by row.
        parts: for each expert in turn, its rows' places, gradient ``[n, O]`` and input ``[n, I]``.
        shape: the operand's shape.
    """

    def __init__(
        self, rows: Rows, parts: list[tuple[slice, Tensor, Tensor]], shape: torch.Size
    ) -> None:
        super().__init__(rows)
        self.shape = shape
        self.experts = []
        for places, grad, x in parts:
            mine = rows.samples(grad.device)[places]
            own = Rows((len(grad),), rows.num_samples, samples=mine)
            self.experts.append(LinearUse(own, grad, x, transposed=True))

    def add_to(self, score: Tensor, add: Accumulator) -> None:
        """Add the f's of all samples to ``score [E, I, O]``."""
        for target, expert in zip(score, self.experts, strict=True):
            expert.add_to(target, add)

    def grads(self) -> Iterator[Tensor]:
        """Yield one sample's gradient at a time."""
        for parts in zip(*(expert.grads() for expert in self.experts), strict=True):
            yield torch.stack(parts, 1)
