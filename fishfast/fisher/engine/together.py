"""The uses that a batch makes of one weight, added up before the square.

A sample's gradient of a weight that a model uses several times in one forward (tied embeddings,
shared layers) is the sum over the uses, so f comes after. Parts of a parameter that do not overlap
(the experts of a stack) are weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.operands import Operand, Tracker
from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.uses import EmbeddingUse, LinearUse, Use

__all__ = ["add_tied_head", "add_together"]


def add_together(
    uses: Sequence[tuple[Operand, Use]], tracker: Tracker, score_of: Callable[[str], Tensor],
    add: Accumulator,
) -> None:  # fmt: skip
    """Sum the uses of each sample, then add f of the sums to the scores.

    Args:
        uses: operands that share parameters, with their uses.
        tracker: the tracked parameters.
        score_of: name -> the parameter's scores, of its strides.
        add: f, and what runs the sums.
    """
    operands, found = [operand for operand, _ in uses], [use for _, use in uses]
    region = operands[0].region
    if region is not None and all(operand.region == region for operand in operands):
        score = region.of(score_of(region.name))
        linear = [use for use in found if isinstance(use, LinearUse)]
        rows = [use for use in found if isinstance(use, EmbeddingUse)]
        same_side = len({use.transposed for use in linear}) <= 1
        if len(found) == 1:
            found[0].add_to(score, add)
        elif len(linear) + len(rows) == len(found) and same_side:
            _add_linear_and_rows(score, linear, rows, add)
        else:
            for grads in zip(*(_one_by_one(use) for use in found), strict=True):
                add.add_samples(score, torch.stack(grads).sum(0))
        return
    slope = tracker.slope(operands[0]) if len(found) == 1 else None
    if slope is not None:
        of_operand = torch.zeros_like(slope)
        found[0].add_to(of_operand, add)
        score_of(operands[0].names[0]).add_(of_operand * add.f(slope))
        return
    for grads in zip(*(_one_by_one(use) for use in found), strict=True):
        total: dict[str, Tensor] = {}
        for operand, grad in zip(operands, grads, strict=True):
            for name, part in tracker.pull_back(operand, grad).items():
                total[name] = total[name] + part if name in total else part
        for name, grad in total.items():
            add.add_samples(score_of(name), grad)


def _one_by_one(use: Use) -> Iterator[Tensor]:
    for grads in use.grads():
        yield from grads.split(1)


def _add_linear_and_rows(
    score: Tensor, linear: list[LinearUse], rows: list[EmbeddingUse], add: Accumulator
) -> None:
    """Layers that are called several times, embeddings, and heads tied to them."""
    if linear and rows:
        tokens, samples = (
            torch.cat([getattr(use, name) for use in rows]) for name in ("tokens", "samples")
        )
        factors = _joined([use.packed() for use in linear])
        rows = [*rows, _add_but_own_rows(score, factors, tokens, samples, rows[0].rows, add)]
    elif linear:
        add.add_linear(score, *_joined([use.packed() for use in linear]))
    if rows:
        tokens, samples, grad = (
            torch.cat([getattr(use, name).to(torch.float32 if name == "grad" else torch.int64)
                       for use in rows])
            for name in ("tokens", "samples", "grad")
        )  # fmt: skip
        add.add_embedding(score, tokens, samples, grad)


def add_tied_head(
    score: Tensor, head: LinearUse, tokens: Tensor, samples: Tensor, add: Accumulator
) -> EmbeddingUse:
    """Add the gradient of a head tied to an embedding, but on the rows of a sample's own tokens.

    On those rows a sample has the embedding's gradient too, which the backward reaches last; there
    f waits for it. They are few, and the gradient of the logits, the largest of all, need not wait.

    Args:
        score: ``[V, D]``.
        head: the head's use.
        tokens: all tokens that the embedding looks up, ``[N]``.
        samples: the sample of each.
        add: f, and what runs the sums.

    Returns:
        The gradient on the rows left out, to be added to the embedding's.
    """
    factors = head.packed()
    return _add_but_own_rows(score, factors, tokens, samples, head.rows, add)


def _add_but_own_rows(
    score: Tensor,
    factors: tuple[Tensor, ...],
    tokens: Tensor,
    samples: Tensor,
    rows: Rows,
    add: Accumulator,
) -> EmbeddingUse:
    left, right, starts, ends = factors
    if 0 in left.stride():
        left = left.clone()
    own, of, grads, hidden = [], [], [], []
    for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        mine = tokens[samples == b].unique()
        columns = left[start:end, mine]
        own.append(mine)
        of.append(torch.full_like(mine, b))
        grads.append(columns.float().T @ right[start:end].float())
        hidden.append((slice(start, end), mine, columns))
        left[start:end, mine] = 0
    add.add_linear(score, left, right, starts, ends)
    for places, mine, columns in hidden:  # the tensor may be the model's
        left[places, mine] = columns
    return EmbeddingUse(rows, torch.cat(own), torch.cat(of), torch.cat(grads), len(score))


def _joined(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Put packed rows of several uses together, sample by sample."""
    if len(parts) == 1:
        return parts[0]
    left, right, lengths = [], [], torch.zeros_like(parts[0][2])
    for b in range(len(lengths)):
        for a, g, starts, ends in parts:
            left.append(a[int(starts[b]) : int(ends[b])])
            right.append(g[int(starts[b]) : int(ends[b])])
    for _, _, starts, ends in parts:
        lengths += ends - starts
    ends = lengths.cumsum(0)
    return torch.cat(left), torch.cat(right), ends - lengths, ends
