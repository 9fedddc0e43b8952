"""Finds out which sample each row of an intercepted call belongs to, by looking at gradients.

No name and no shape is trusted: a row belongs to the sample whose loss has a gradient there. Two
backwards tell which one, without any weight's gradient: of all losses but the largest, each times a
random number, so that nothing cancels; and of all losses, each times a power of two of its own on
top of that, the largest loss times a large one. A row of one sample is multiplied by exactly its
power, whose exponent names the sample; a row of the largest loss has a gradient in the second only.
Where a row is neither (it mixes samples, or its gradient is too small to be exact), backwards of
half of the losses and of the other half decide, one pair for each bit of the sample's number.

What is learned is a `Layout` for each call of a graph of this structure. Which loss a row belongs
to depends on what lies between the call and the losses: it is trusted in later batches if the
operations there say the same (row_order.py), no tensor of indices moves rows, and no gradient
passes through Python. Other calls (experts, sorted or packed sequences, learned prototypes) are
looked at in every batch, and all calls again after 4, 16, 64, ... batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.engine.audit import Audit
from fishfast.fisher.engine.row_order import sample_steps
from fishfast.fisher.engine.rows import NO_GRADIENT, Layout, Rows, layouts
from fishfast.fisher.engine.signatures import BASE, OWN, Verdict, by_halves, by_powers, judge

__all__ = ["RowFinder"]

# Backward of sum(weights * losses) to all intercepted calls.
Backward = Callable[[Tensor], None]

# Elements of a gradient that are held in float64 at once.
_PART = 2**20
# Batches after which nothing is trusted once: where two that look alike were not, it shows.
_LOOKED_AT_AGAIN = {4**exponent + 1 for exponent in range(1, 16)}
# Structures of graphs whose calls are remembered: models that route tokens make new ones for ever.
_STRUCTURES = 64


class RowFinder:
    """Knows the rows of the calls that it has seen."""

    def __init__(self) -> None:
        # By the structure of the graph, then by the place of the call in it.
        self._known: dict[int, dict[int, set[Layout]]] = {}
        self._silent: dict[int, set[int]] = {}
        # By structure and sizes: the step of the samples in each call's result, by its place.
        self._steps: dict[tuple[Any, ...], list[int | None]] = {}
        self._num_batches = 0
        self._observed: dict[Any, Tensor] = {}
        self._directions: dict[tuple[int, torch.device], Tensor] = {}

    def observe(self, node: Any, x: Tensor | None, grad: Tensor) -> None:
        """Note one number for each row."""
        self._observed[node] = self.signature(node, grad)

    def signature(self, node: Any, grad: Tensor) -> Tensor:
        """Return one number for each row: its gradient along a fixed random direction.

        In float64, so that a gradient times a power of two gives exactly that number times it.
        """
        rows = grad.reshape(prod(node.lead), prod(grad.shape[len(node.lead) :]))
        direction = self._direction(rows.shape[1], rows.device)
        # In parts: in float64 the gradient of a language model's outputs would be the largest
        # tensor of all.
        if rows.numel() <= _PART:
            return rows.double() @ direction
        parts = rows.split(max(1, _PART // max(1, rows.shape[1])))
        return torch.cat([part.double() @ direction for part in parts])

    def _direction(self, size: int, device: torch.device) -> Tensor:
        found = self._directions.get((size, device))
        if found is None:
            generator = torch.Generator().manual_seed(size)
            found = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
            self._directions[size, device] = found
        return found

    def is_new(self, found: Audit) -> bool:
        """Return whether no graph of this structure has been looked at."""
        return found.structure not in self._silent

    def known(self, found: Audit, losses: Tensor) -> list[Any]:
        """Give their rows to the calls where they are known; return the other calls.

        A call that no gradient has reached so far keeps ``rows = None`` and is not returned.

        Args:
            found: the calls.
            losses: ``[B]``.

        Returns:
            The calls to look at.
        """
        if len(self._silent) > _STRUCTURES:
            self._known.clear()
            self._silent.clear()
            self._steps.clear()
        self._num_batches += 1
        num_samples = len(losses)
        silent = self._silent.setdefault(found.structure, set())
        steps = self._steps_of(found, losses)
        missing = []
        for place, node in enumerate(found.calls):
            node.place, node.rows = (found.structure, place), None
            layout = self._trusted(node, found, num_samples, steps[place])
            if layout is not None:
                node.rows = Rows(node.lead, num_samples, layout)
            elif node in found.moved or place not in silent or self._known_layout(node):
                missing.append(node)
        look_again = num_samples > 1 and self._num_batches in _LOOKED_AT_AGAIN
        return found.calls if look_again else missing

    def _steps_of(self, found: Audit, losses: Tensor) -> list[int | None]:
        """Return where the samples lie in each call's result, where the graph says so."""
        num_samples = len(losses)
        if num_samples == 1:
            return [None] * len(found.calls)
        sizes = tuple([node.lead for node in found.calls])
        sizes += (*[node._saved_self_sym_sizes for node in found.views], *found.cuts)
        steps = self._steps.get((found.structure, num_samples, sizes))
        if steps is None:
            of = sample_steps(losses.grad_fn, losses.output_nr, num_samples, found.consumers)
            steps = [of.get((node, 0)) for node in found.calls]
            self._steps[found.structure, num_samples, sizes] = steps
        return steps

    def _known_layout(self, node: Any) -> Layout | None:
        structure, place = node.place
        known = self._known.get(structure, {}).get(place, set())
        return next(iter(known)) if len(known) == 1 else None

    def _trusted(
        self, node: Any, found: Audit, num_samples: int, step: int | None
    ) -> Layout | None:
        """Return the layout seen before if the graph says that it is the same."""
        if num_samples == 1:
            return Layout("one")
        layout = self._known_layout(node)
        if layout is None or node in found.moved or node in found.unproven:
            return None
        fits = layout in layouts(node.lead, num_samples)
        return layout if fits and step == layout.step(node, num_samples) else None

    def find(
        self, nodes: list[Any], found: Audit, num_samples: int, losses: Tensor, backward: Backward
    ) -> tuple[list[Any], list[Any]]:
        """Look at the rows of calls and give them to the nodes.

        Args:
            nodes: what to look at.
            found: all calls.
            num_samples: B.
            losses: the losses, for their sizes; their graph is kept.
            backward: runs a backward with one weight per loss.

        Returns:
            The calls where a row has several samples, and the calls that any gradient reached.
        """
        device = losses.device
        number = torch.arange(num_samples, device=device)
        own = losses.detach().argmax()  # a sample without labels has no gradient to look at
        generator = torch.Generator().manual_seed(num_samples)
        # Below 1, so that fp16 holds what it holds in an ordinary backward.
        scale = (0.5 + torch.rand(num_samples, generator=generator) / 2).to(device, losses.dtype)
        seen = [self._signatures(backward, torch.where(number == own, 0, scale))]
        base = 1
        while base < num_samples:
            tags = torch.pow(2.0, (number // base) % BASE - BASE // 2).to(losses.dtype)
            tags = torch.where(number == own, 2.0**OWN, tags)
            seen.append(self._signatures(backward, scale * tags))
            base *= BASE
        verdicts = judge(nodes, seen, num_samples, functools.partial(by_powers, own, num_samples))
        unclear = [node for node, verdict in verdicts.items() if verdict.several]
        if unclear:
            halves = []
            for bit in range((num_samples - 1).bit_length()):
                chosen = (number >> bit) & 1 == 1
                halves += [self._signatures(backward, scale * half) for half in (~chosen, chosen)]
            verdicts.update(judge(unclear, halves, num_samples, by_halves))
        again = found.moved | found.unproven
        for node, verdict in verdicts.items():
            _check_trusted(node, verdict, num_samples)
            structure, place = node.place
            silent = self._silent.setdefault(structure, set())
            (silent.discard if verdict.reached else silent.add)(place)
            if not verdict.several:
                self._learn(node, verdict, num_samples, again=node in again)
        self._directions.clear()
        several = [node for node, verdict in verdicts.items() if verdict.several]
        reached = [node for node, verdict in verdicts.items() if verdict.reached]
        if not reached:  # a batch without labels, say, which tells nothing of the next one
            self._silent.clear()
        return several, reached

    def _signatures(self, backward: Backward, weights: Tensor) -> dict[Any, Tensor]:
        self._observed = {}
        backward(weights)
        observed, self._observed = self._observed, {}
        return observed

    def _learn(self, node: Any, verdict: Verdict, num_samples: int, again: bool) -> None:
        """Give the node its rows; remember the layout where only one fits, if not ``again``."""
        if not verdict.reached:
            return
        if not verdict.fitting:
            node.rows = Rows(node.lead, num_samples, samples=verdict.samples)
            return
        node.rows = Rows(node.lead, num_samples, verdict.fitting[0])
        if len(verdict.fitting) == 1 and verdict.told_apart and not again:
            structure, place = node.place
            self._known.setdefault(structure, {}).setdefault(place, set()).add(verdict.fitting[0])


def _check_trusted(node: Any, verdict: Verdict, num_samples: int) -> None:
    """Raise if the rows that a call has been given are not those that its gradients say."""
    if node.rows is None or num_samples == 1 or not verdict.reached:
        return
    if node.rows.layout is not None:
        agree = node.rows.layout in verdict.fitting and not verdict.several
    else:
        seen = verdict.samples != NO_GRADIENT
        given = node.rows.samples(verdict.samples.device)
        agree = torch.equal(given[seen], verdict.samples[seen])
    if not agree:
        names = [operand.names[0] for operand in node.operands if operand is not None]
        raise ValueError(
            "a model's rows must belong to the same samples in batches whose graphs are the same; "
            f"those of {names[0]!r} changed, so that this batch, and perhaps others before it, "
            "cannot be told apart; nothing of this call was kept; give batches one by one and add "
            "the results"
        )
