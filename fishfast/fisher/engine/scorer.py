"""Scores one batch: forward, audit, one backward for intercepted calls, fallback for the rest."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fishfast.fisher.checks import is_empty, refuse_mean
from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.audit import Audit, audit
from fishfast.fisher.engine.costs import in_many_small_calls
from fishfast.fisher.engine.coupling import (
    COUPLED,
    SamplesReached,
    names_of,
    refuse_coupled,
)
from fishfast.fisher.engine.eager import checkpoints_run_again, not_compiled
from fishfast.fisher.engine.gradients import gradients
from fishfast.fisher.engine.interception import (
    EAGER,
    LATER,
    LAZY,
    NEVER,
    Interception,
    SecondDerivativeError,
)
from fishfast.fisher.engine.operands import is_opaque
from fishfast.fisher.engine.origins import Origins
from fishfast.fisher.engine.probe import RowFinder
from fishfast.fisher.engine.recorder import Recorder
from fishfast.fisher.engine.rows import Layout, Rows
from fishfast.fisher.engine.rules import BroadcastRule
from fishfast.fisher.foreign import local
from fishfast.fisher.objective import Losses, Objective
from fishfast.fisher.result import Fisher
from fishfast.fisher.score_files import WORK
from fishfast.fisher.untouched import Buffers

__all__ = ["NotFinite", "Scorer"]

UNUSED, BATCHED = "not used", "batched"
EXPANDED, SORTED = "batched, where it meets the data", "batched, rows sorted by sample"
ALONE = "one sample at a time"
_ROADS = (UNUSED, BATCHED, EXPANDED, SORTED)  # a parameter's road is the last of those it takes

# Added to a road: weight norm, a recurrent layer over the data itself, a table that is looked up.
THROUGH = "; sample by sample through what is computed from it"


class NotFinite(Exception):
    """The scores are not finite after this batch."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.batch = batch


class Scorer:
    """Adds batches to the scores.

    Args:
        model: what is scored.
        objective: what is differentiated.
        parameters: the parameters to score, by name.
        scores: fp32 accumulators by the same names and of the same strides, added to in place.
        add: f, and what runs the sums.

    Attributes:
        fallback: name -> reason, for parameters that are scored one sample at a time.
        roads: name -> how its gradients are caught.
        passes: how many forward and backward passes each phase took.
        seconds: how long each phase took, by the wall clock.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        add: Accumulator,
    ) -> None:
        self.model, self.objective = model, objective
        self.parameters, self.scores, self.add = parameters, scores, add
        self.interception = Interception(parameters)
        self.rows = RowFinder()
        self._buffers: Buffers | None = None  # as the batch found them, once a forward has run
        self.fallback: dict[str, str] = {}
        self._one_loss_each = False  # known from a batch with several
        self._all_mixed = False  # in every call that a gradient reached
        self.roads: dict[str, str] = dict.fromkeys(parameters, UNUSED)
        self.passes = dict.fromkeys(WORK, 0)
        self.seconds = dict.fromkeys(WORK, 0.0)
        self._leave_to_autograd(
            {
                name: f"a {type(p).__name__}, which has no rule"
                for name, p in parameters.items()
                if is_opaque(p)
            }
        )

    def go_on(self, before: Fisher) -> None:
        """Take over the roads and the cost of the part of a run that was scored before."""
        self._leave_to_autograd(before.fallback)
        self.roads.update(before.roads)
        self.passes.update(before.passes)
        self.seconds.update(before.seconds)

    def add_batch(self, batch: Any, limit: int | None) -> tuple[int, int]:
        """Score at most ``limit`` samples of a batch.

        Returns:
            How many were scored, and how many the batch has.

        Raises:
            NotFinite: the scores are not, and cannot be used any more.
        """
        if is_empty(batch):
            return 0, 0
        device = next(iter(self.parameters.values())).device.type
        probes = self.passes["probe"]
        with self.scoring():
            self._buffers = None
            losses, found = self.forward(batch)
            if len(losses.probe) == 0:
                return 0, 0
            if losses.mean_of is not None:
                self._refuse_mean(losses.mean_of, batch)
            self._one_loss_each |= len(losses.probe) > 1
            with torch.autocast(device, enabled=False):
                while several := self._find_rows(losses.probe, found):
                    if self._all_mixed:
                        refuse_coupled(several, found, lambda: self._forward_with_origins(batch)[1])
                    self._catch_later(several)
                    losses, found = self.forward(batch)
                size = len(losses.probe)
                counted = size if limit is None else min(limit, size)
                rows = losses.rows()
                row = next(rows, None)
                while row is not None:
                    following = next(rows, None)
                    self._add_intercepted(row, counted, found, last=following is None)
                    self._add_fallback(row, counted)
                    row = following
                if not self._is_finite():
                    raise NotFinite(batch)
        if probes := self.passes["probe"] - probes:  # where every batch takes some, it shows here
            self._leave_to_autograd(in_many_small_calls(found, probes))
        self._note_roads(found)
        return counted, size

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Intercept the model's calls, in this thread: what forward and backward need around them.

        Checkpointed layers that run again inside backward are intercepted, too, on every device.
        """
        with (
            not_compiled(),
            checkpoints_run_again(),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),
            self.interception,
        ):
            yield

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def forward(self, batch: Any) -> tuple[Losses, Audit]:
        """Run the forward until every parameter that calls do not cover is left to autograd."""
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        while True:
            if self._buffers is None:
                self._buffers = Buffers(self.model)
            else:  # a model that counts in its buffers counts this batch once
                self._buffers.put_back()
            self.passes["forward"] += 1
            self.interception.most_rows = 1
            with self._timed("forward"):
                try:
                    # Containers of its own: loss_fn may take entries out, and may run again.
                    losses = self.objective(self.model, tree_map(_own_container, batch))
                except SecondDerivativeError:
                    reason = "loss_fn takes gradients itself"
                    self._leave_to_autograd(
                        {name: reason for name in self.parameters if name not in self.fallback}
                    )
                    continue
                found = audit(losses.probe, self.interception.tracker)
            if versions != [tensor._version for tensor in tensors]:
                raise ValueError(
                    "loss_fn must leave the batch's tensors as they are, because a forward may run "
                    "again; it changed one in place; work on a copy"
                )
            stale = [name for name in names_of(found.calls) if name in self.fallback]
            if stale:
                raise ValueError(
                    "a model must not use tensors of an earlier forward, such as cached features; "
                    f"it does, behind {stale[0]!r}; clear them before scoring"
                )
            foreign = {
                name: f"used by {call}, which has no rule for it"
                for name, call in found.foreign.items()
                if name not in self.fallback
            }
            calls = in_many_small_calls(found).items()
            # What is batched already stays, however few samples a last batch has.
            foreign |= {name: reason for name, reason in calls if self.roads[name] == UNUSED}
            if not foreign:
                return losses, found
            self._leave_to_autograd(foreign)

    def _leave_to_autograd(self, reasons: Mapping[str, str]) -> None:
        self.fallback.update(reasons)
        self.interception.levels.update(dict.fromkeys(reasons, NEVER))

    def _catch_later(self, nodes: list[Any]) -> None:
        """Catch the operands of calls with mixed rows further on, or not at all."""
        levels, names = self.interception.levels, names_of(nodes)
        meets_data = set(names_of([node for node in nodes if node.rule.sees_data]))
        if early := [name for name in names if levels[name] == EAGER and name not in meets_data]:
            # What seemed to be data to other calls may be computed from these.
            levels.update(dict.fromkeys(early, LATER))
            return
        for name in names:
            if levels[name] < LAZY:
                levels[name] = LAZY
            else:
                reason = "the gradient of one loss reaches several rows of its call"
                self._leave_to_autograd({name: reason})

    def _find_rows(self, losses: Tensor, found: Audit) -> list[Any]:
        """Give every call its rows; return those where samples mix."""
        unknown = self.rows.known(found, len(losses))
        return self._probe(unknown, losses, found) if unknown else []

    def _probe(self, nodes: list[Any], losses: Tensor, found: Audit) -> list[Any]:
        def backward(weights: Tensor) -> None:
            self.passes["probe"] += 1
            self.backward((losses * weights).sum(), self.rows.observe)

        with self._timed("probe"):
            several, reached = self.rows.find(nodes, found, len(losses), losses, backward)
        self._all_mixed = len(several) == len(reached)
        return several

    def _refuse_mean(self, size: int, batch: Any) -> None:
        if self._one_loss_each:  # a loss_fn that has given several losses does not take means
            return
        losses, found = self._forward_with_origins(batch)
        reached = SamplesReached(size)
        self.passes["probe"] += 1
        with self._timed("probe"):
            self.backward(losses.probe.sum(), reached.observe)
        if reached.most > 1:
            refuse_mean(size)

    def _forward_with_origins(self, batch: Any) -> tuple[Losses, Audit]:
        """Run the forward; its calls know whether their inputs come from the model alone."""
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self.interception.origins = Origins(self.model, tensors)
        try:
            with self.interception.origins:
                return self.forward(batch)
        finally:
            self.interception.origins = None

    def _add_intercepted(self, losses: Tensor, counted: int, found: Audit, last: bool) -> None:
        if not found.calls:
            return
        recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
        total = losses[:counted].sum()
        # The graph's memory goes back to the model's own backward, unless it is needed again.
        keep_graph = not last or bool(self.fallback) or any(n.rows is None for n in found.calls)
        while True:
            self.passes["backward"] += 1
            with self._timed("backward"):
                self.backward(total, recorder.observe, keep_graph)
                left_out = recorder.finish()
            if not recorder.unresolved:
                return
            # A call that no gradient had reached before, and whose rows are not known yet.
            if mixed := self._probe(recorder.unresolved, losses, found):
                raise ValueError(COUPLED.format(names_of(mixed)[0]))
            if any(node.rows is None for node in recorder.unresolved):
                self._add_alone(losses[:counted], left_out, found)
                return
            recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
            recorder.only = left_out

    def _add_alone(self, losses: Tensor, left_out: set[int], found: Audit) -> None:
        """Record groups of uses one sample at a time: gradients too small, or not finite, for rows.

        A gradient that is rounding alone is 0 in one backward and not in another.
        """
        for node in found.calls:
            if any(id(group) in left_out for group in found.groups[node]):
                node.rows = Rows(node.lead, 1, Layout("one"))
        with self._timed("backward"):
            for loss in losses:
                self.passes["backward"] += 1
                recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
                recorder.only = left_out
                self.backward(loss, recorder.observe)
                recorder.finish()

    def backward(
        self, loss: Tensor, observe: Callable[[Any, Any, Tensor], None], keep_graph: bool = True
    ) -> None:
        """Run the backward of all intercepted calls; their weights' gradients are not computed."""
        self.interception.observe = observe
        try:
            gradients(loss, [self.interception.anchor], keep_graph=keep_graph)
        finally:
            self.interception.observe = None

    def _add_fallback(self, losses: Tensor, counted: int) -> None:
        """One backward per sample, for the parameters that no rule covers."""
        names = list(self.fallback)
        if not names:
            return
        inputs = [self.parameters[name] for name in names]
        with self._timed("fallback"):
            for loss in losses[:counted]:
                self.passes["fallback"] += 1
                for name, grad in zip(names, gradients(loss, inputs), strict=True):
                    if grad is not None:
                        grad = local(grad, like=self.parameters[name])
                        self.scores[name] += self.add.f(grad.float())

    def _is_finite(self) -> bool:
        """Whether the scores are; a gradient that is not ends in them. Waits for the device."""
        sums: dict[torch.device, list[Tensor]] = {}
        for score in self.scores.values():
            sums.setdefault(score.device, []).append(score.sum())
        if all(bool(torch.stack(parts).isfinite().all()) for parts in sums.values()):
            return True
        return all(bool(score.isfinite().all()) for score in self.scores.values())

    def _note_roads(self, found: Audit) -> None:
        for node in found.calls:
            for operand in node.operands:
                if operand is None:
                    continue
                if node.rows is not None and node.rows.layout is None:
                    road = SORTED
                elif operand.region is None or isinstance(node.rule, BroadcastRule):
                    road = EXPANDED
                else:
                    road = BATCHED
                for name in operand.names:
                    if name not in self.fallback:
                        before = self.roads[name].removesuffix(THROUGH)
                        self.roads[name] = max(before, road, key=_ROADS.index)
        for name in self.interception.tracker.pulled_back - self.fallback.keys():
            self.roads[name] = self.roads[name].removesuffix(THROUGH) + THROUGH
        for name, reason in self.fallback.items():
            self.roads[name] = f"{ALONE}: {reason}"


def _own_container(value: Any) -> Any:
    """Copy a mapping that is no dict, such as transformers' BatchEncoding; others are rebuilt."""
    return copy.copy(value) if isinstance(value, MutableMapping) else value
