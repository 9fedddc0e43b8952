"""Where the gradients of calls go, worked out once for graphs that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fishfast.fisher.engine.operands import Operand, disjoint_groups
from fishfast.fisher.engine.staged_scores import StagedScores

__all__ = ["Group", "Plan", "Plans"]

# Uses of overlapping parts of parameters: places of calls, and which of their operands.
Group = list[tuple[int, int]]

# Graphs that are remembered: models that cut their weights anew make new ones for ever.
_PLANS = 64


@dataclass(frozen=True, eq=False)
class Plan:
    """What follows from the operands of the calls alone.

    Attributes:
        groups: for each call, for each of its operands, the uses, itself among them, that are
            summed before f.
        scores: for each call the scores of its operands, where f follows at once and every operand
            is a part of its parameter; else None. Of scores that live elsewhere, their regions.
    """

    groups: list[list[Group | None]]
    scores: list[tuple[Any, ...] | None]


class Plans:
    """The plans of the graphs seen so far.

    Args:
        scores: fp32 accumulators by name, of the parameters' strides.
    """

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._scores = scores
        self._made: dict[Any, Plan] = {}

    def of(self, structure: int, operands: Sequence[Sequence[Operand | None]]) -> Plan:
        """Return the plan for calls with these operands.

        Args:
            structure: the same for graphs of the same calls with operands of the same names.
            operands: of each call.
        """
        regions = tuple([o.region for of in operands for o in of if o is not None and o.is_part])
        plan = self._made.get((structure, regions))
        if plan is None:
            if len(self._made) >= _PLANS:
                self._made.clear()
            groups = _groups(operands)
            scores = [self._direct(*each) for each in zip(operands, groups, strict=True)]
            plan = self._made[structure, regions] = Plan(groups, scores)
        return plan

    def _direct(
        self, operands: Sequence[Operand | None], groups: Sequence[Group | None]
    ) -> tuple[Any, ...] | None:
        found: list[Any] = []
        for operand, group in zip(operands, groups, strict=True):
            if operand is None:
                found.append(None)
            elif operand.region is None or group is None or len(group) > 1:
                return None
            else:
                staged = isinstance(self._scores, StagedScores)
                region = operand.region
                found.append(region if staged else region.of(self._scores[region.name]))
        return tuple(found)


def _groups(operands: Sequence[Sequence[Operand | None]]) -> list[list[Group | None]]:
    """Join the uses of each parameter that overlap, across operands of several parameters."""
    uses = [
        (place, i, operand)
        for place, of in enumerate(operands)
        for i, operand in enumerate(of)
        if operand is not None
    ]
    by_name: dict[str, list[int]] = {}
    for number, (_, _, operand) in enumerate(uses):
        for name in operand.names:
            by_name.setdefault(name, []).append(number)
    group_of: list[Group] = [[(place, i)] for place, i, _ in uses]
    number_of = {(place, i): number for number, (place, i, _) in enumerate(uses)}
    for numbers in by_name.values():
        if len(numbers) == 1:
            continue
        first: dict[int, int] = {}
        overlapping = disjoint_groups(uses[number][2].region for number in numbers)
        for number, which in zip(numbers, overlapping, strict=True):
            joined, group = group_of[first.setdefault(which, number)], group_of[number]
            if group is not joined:
                joined += group
                for use in group:
                    group_of[number_of[use]] = joined
    groups: list[list[Group | None]] = [[None] * len(of) for of in operands]
    for (place, i, _), group in zip(uses, group_of, strict=True):
        groups[place][i] = group
    return groups
