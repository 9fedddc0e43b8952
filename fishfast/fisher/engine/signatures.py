"""From numbers that rows show in backwards of weighted losses to the samples of the rows.

Calls of the same rows are looked at together, and the answer comes in one piece: the work on a GPU
and the waits for it do not grow with the layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishfast.fisher.engine.rows import NO_GRADIENT, SEVERAL, Layout, layouts

__all__ = ["BASE", "OWN", "Verdict", "by_halves", "by_powers", "judge"]

# Powers of two from 2**-8 to 2**7, which fp16 gradients survive; more samples take more digits.
BASE = 16
# Exponent for the largest loss: other losses would have to be 2**34 times larger to hide it.
OWN = 10
# Rows of several calls that are looked at together.
_ROWS = 2**22
# Rounding of a gradient in low precision, which the other losses of a backward may change.
_SAME = 1e-2


class Verdict(NamedTuple):
    """What the rows of a call tell.

    Attributes:
        samples: the sample of each row, `NO_GRADIENT` or `SEVERAL`, ``[N]``.
        reached: whether a gradient reached any row.
        several: whether a row has several samples.
        told_apart: whether rows of more than one sample were seen.
        fitting: the layouts that say the same of all rows that have a gradient.
    """

    samples: Tensor
    reached: bool
    several: bool
    told_apart: bool
    fitting: list[Layout]


def judge(
    nodes: Sequence[Any], signatures: Sequence[Mapping[Any, Tensor]], num_samples: int,
    find: Callable[..., Tensor],
) -> dict[Any, Verdict]:  # fmt: skip
    """Return what the rows of each call tell.

    Args:
        nodes: the calls.
        signatures: of several backwards: call -> one number for each row.
        num_samples: B.
        find: from the numbers of each backward, of any shape, to the samples of the rows.

    Returns:
        A verdict for each call that every backward reached.
    """
    verdicts = {}
    for lead, group in _alike(nodes, signatures[0]):
        if 0 in lead:
            nothing = Verdict(signatures[0][group[0]].long(), False, False, False, [])
            verdicts.update(dict.fromkeys(group, nothing))
            continue
        samples = find(*[torch.stack([of[node] for node in group]) for of in signatures])
        possible = layouts(lead, num_samples)
        has_sample = samples >= 0
        largest = torch.where(has_sample, samples, -1).amax(1)
        least = torch.where(has_sample, samples, num_samples).amin(1)
        facts = [(samples != NO_GRADIENT).any(1), (samples == SEVERAL).any(1), largest > least]
        for layout in possible:
            expected = layout.samples(lead, num_samples, samples.device)
            facts.append(((samples == expected) | ~has_sample).all(1) & (largest >= 0))
        for node, of, told in zip(group, samples, torch.stack(facts, 1).tolist(), strict=True):
            reached, several, apart, *fits = told
            fitting = [layout for layout, fit in zip(possible, fits, strict=True) if fit]
            verdicts[node] = Verdict(of, reached, several, apart, fitting)
    return verdicts


def _alike(
    nodes: Sequence[Any], seen: Mapping[Any, Tensor]
) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """Yield calls whose rows have the same sizes and place, not too many at once."""
    groups: dict[Any, list[Any]] = {}
    for node in nodes:
        if node in seen:
            groups.setdefault((node.lead, seen[node].device), []).append(node)
    for (lead, _), group in groups.items():
        step = max(1, _ROWS // max(1, prod(lead)))
        for first in range(0, len(group), step):
            yield lead, group[first : first + step]


def by_powers(own: Tensor, num_samples: int, others: Tensor, *digits: Tensor) -> Tensor:
    """Return the sample of each row, `NO_GRADIENT` or `SEVERAL`.

    Args:
        own: the sample of the largest loss.
        num_samples: B.
        others: the rows' numbers from all losses but the largest.
        digits: those from all losses, each times a power of two that is a digit of its number.
    """
    samples = torch.zeros_like(others, dtype=torch.int64)
    exact = torch.ones_like(samples, dtype=torch.bool)
    base = 1
    for tagged in digits:
        exponent = torch.log2(tagged / others).round()
        digit = exponent + BASE // 2
        exact &= (tagged == others * torch.pow(2.0, exponent)) & (digit >= 0) & (digit < BASE)
        samples += base * digit.nan_to_num(0, 0, 0).long()
        base *= BASE
    samples = torch.where(exact & (samples < num_samples), samples, SEVERAL)
    silent = torch.where(digits[0] != 0, own.to(others.device), NO_GRADIENT)
    samples = torch.where(others == 0, silent, samples)
    # Powers of two are too large for fp16, say; halves tell.
    for observed in (others, *digits):
        samples = torch.where(observed.isfinite(), samples, SEVERAL)
    return samples


def by_halves(*halves: Tensor) -> Tensor:
    """Return the same from backwards of half of the losses and of the other half, bit by bit.

    A row of one sample has the same gradient in every half that its loss is in, whatever the other
    losses are; else its backward looks at the whole batch.

    Args:
        halves: the rows' numbers from the losses whose number has a 0 in the lowest bit, from the
            others, and so on for every bit.
    """
    samples = torch.zeros_like(halves[0], dtype=torch.int64)
    several, reached, silent = (torch.zeros_like(samples, dtype=torch.bool) for _ in range(3))
    first = torch.zeros_like(halves[0])
    for bit, (low, high) in enumerate(zip(halves[::2], halves[1::2], strict=True)):
        # What is not finite is refused later, by the name of the scores that it ends in.
        in_low, in_high = (of.nan_to_num(0, 0, 0) != 0 for of in (low, high))
        samples += in_high.long() << bit
        value = torch.where(in_high, high, low)
        first = value if bit == 0 else first
        several |= in_low & in_high | ((value - first).abs() > _SAME * first.abs())
        reached |= in_low | in_high
        silent |= ~(in_low | in_high)
    samples = torch.where(reached, samples, NO_GRADIENT)
    return torch.where(several | (reached & silent), SEVERAL, samples)
