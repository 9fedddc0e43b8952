"""Turns the gradients of intercepted calls into scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.audit import Audit
from fishfast.fisher.engine.operands import Operand, Tracker
from fishfast.fisher.engine.plan import Group
from fishfast.fisher.engine.rules import EmbeddingRule
from fishfast.fisher.engine.staged_scores import StagedScores
from fishfast.fisher.engine.together import add_tied_head, add_together
from fishfast.fisher.engine.uses import LinearUse, Use

__all__ = ["Recorder"]


class Recorder:
    """Adds the calls of one backward to the scores.

    Args:
        tracker: the tracked parameters.
        scores: fp32 accumulators by name, added to in place.
        add: f, and what runs the sums.
        found: the calls, and which of their uses are summed before the square.

    Attributes:
        unresolved: calls with a gradient whose rows are not known; nothing was added for them.
        only: the groups of uses to record, by identity; None: all.
    """

    def __init__(
        self, tracker: Tracker, scores: Mapping[str, Tensor], add: Accumulator, found: Audit
    ) -> None:
        self.tracker, self.scores, self.add = tracker, scores, add
        self.found = found
        self.unresolved: list[Any] = []
        self.only: set[int] | None = None
        self._places = {node: place for place, node in enumerate(found.calls)}
        self._direct = found.plan.scores
        self._staged = scores if isinstance(scores, StagedScores) else None
        self._waiting: dict[int, list[tuple[Operand, Use]]] = {}
        self._skipped: set[int] = set()

    def observe(self, node: Any, x: Tensor | None, grad: Tensor) -> None:
        """Record one call."""
        if grad.numel() == 0:  # an expert without tokens
            return
        place = self._places.get(node)
        if place is None:
            names = [operand.names[0] for operand in node.operands if operand is not None]
            raise ValueError(
                f"the layer of {names[0]!r} runs again inside the backward of a custom autograd "
                "function, where its gradients cannot be told apart; use torch.utils.checkpoint"
            )
        scores = self._direct[place]
        if self._staged is not None:
            self._staged.trim()
            scores = scores and tuple([part and part.of(self.scores[part.name]) for part in scores])
        if scores is not None and node.rows is not None and self.only is None:  # nearly always
            node.rule.add_to(scores, x, grad, node.rows, self.add)
            return
        groups = self.found.plan.groups[place]
        wanted = [
            group is not None and (self.only is None or id(group) in self.only) for group in groups
        ]
        if node.rows is None:
            if any(wanted) and bool(grad.any()):
                self.unresolved.append(node)
                self.leave_out(node)
            return
        for i, group in enumerate(groups):
            if group is None or not wanted[i]:
                continue
            operand, use = node.operands[i], node.rule.use(i, x, grad, node.rows)
            if len(group) == 1:
                self._add([(operand, use)])
                continue
            if isinstance(use, LinearUse) and (tokens := self._tokens_of_tied(node, group)):
                score = operand.region.of(self.scores[operand.region.name])
                use = add_tied_head(score, use, *tokens, self.add)
            waiting = self._waiting.setdefault(id(group), [])
            waiting.append((operand, use))
            if len(waiting) == len(group) and id(group) not in self._skipped:
                self._add(self._waiting.pop(id(group)))

    def leave_out(self, node: Any) -> None:
        """Add nothing of a call, and of the uses that are summed with its own."""
        self._skipped.update(map(id, self.found.plan.groups[self._places[node]]))

    def _tokens_of_tied(self, node: Any, group: Group) -> tuple[Tensor, Tensor] | None:
        """Return tokens and samples if all other uses of a head's weight are embeddings."""
        if any(self.found.calls[place] in self.found.unproven for place, _ in group):
            return None  # it may be left out, when the head's part is in the scores
        looked_up = []
        for place, j in group:
            other = self.found.calls[place]
            if other is node:
                continue
            whole = (
                other.operands[j].region is not None
                and other.operands[j].region == node.operands[0].region
            )
            if not whole or not isinstance(other.rule, EmbeddingRule) or other.rows is None:
                return None
            looked_up.append(other.rule.tokens_of(other.rows))
        tokens, samples = (torch.cat(parts) for parts in zip(*looked_up, strict=True))
        return tokens, samples

    @torch.no_grad()
    def finish(self) -> set[int]:
        """Add what was waiting for uses that had no gradient; return the groups left out."""
        for group, waiting in self._waiting.items():
            if group not in self._skipped and waiting:
                self._add(waiting)
        self._waiting.clear()
        return self._skipped

    def _add(self, uses: list[tuple[Operand, Use]]) -> None:
        add_together(uses, self.tracker, self.scores.__getitem__, self.add)
