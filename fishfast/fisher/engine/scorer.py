"""Scores one batch: forward, audit, one backward for intercepted calls, fallback for the rest."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.fisher.checks import is_empty, refuse_mean
from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.alone import SampleRecorder
from fishfast.fisher.engine.audit import Audit
from fishfast.fisher.engine.backwards import HIDDEN, Backwards, Repeated
from fishfast.fisher.engine.coupling import COUPLED, SamplesReached, names_of, refuse_coupled
from fishfast.fisher.engine.eager import checkpoints_run_again, not_compiled
from fishfast.fisher.engine.forwards import Forwards
from fishfast.fisher.engine.interception import (
    EAGER,
    LATER,
    LAZY,
    Interception,
    SecondDerivativeError,
)
from fishfast.fisher.engine.operands import is_opaque
from fishfast.fisher.engine.passes import Costs
from fishfast.fisher.engine.plan import Group, Plans
from fishfast.fisher.engine.probe import RowFinder
from fishfast.fisher.engine.recorder import Recorder
from fishfast.fisher.engine.rules import BroadcastRule, ScaleRule
from fishfast.fisher.engine.score_memory import Scores
from fishfast.fisher.engine.staged_scores import StagedScores
from fishfast.fisher.engine.witness import Witness
from fishfast.fisher.foreign import local
from fishfast.fisher.objective import Losses, Objective
from fishfast.fisher.result import Fisher

__all__ = ["NotFinite", "Scorer"]

UNUSED, BATCHED = "not used", "batched"
NOT_REACHED = "not reached by losses that reach other tensors"
EXPANDED, SORTED = "batched, where it meets the data", "batched, rows sorted by sample"
ALONE = "one sample at a time"
# A parameter's road is the last of those it takes.
_ROADS = (UNUSED, NOT_REACHED, BATCHED, EXPANDED, SORTED)

# Added to a road: weight norm, a recurrent layer over the data itself, a table that is looked up.
THROUGH = "; sample by sample through what is computed from it"

_MIXED = "the gradient of one loss reaches several rows of its call"
_NOT_BY_SAMPLE = "a hook or a custom autograd function works on the whole batch's gradient"


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
        scores: fp32 accumulators by the same names, added to in place.
        add: f, and what runs the sums.

    Attributes:
        fallback: name -> reason, for parameters that are scored one sample at a time.
        roads: name -> how its gradients are caught.
        costs: passes, and the seconds that they took.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        scores: Scores | StagedScores,
        add: Accumulator,
    ) -> None:
        self.model, self.objective = model, objective
        self.parameters, self.scores, self.add = parameters, scores, add
        self.interception = Interception(parameters)
        self.costs = Costs()
        self.forwards = Forwards(model, objective, self.interception, Plans(scores), self.costs)
        self.backwards = Backwards(self.interception, self.costs)
        self.rows = RowFinder()
        self._noted: Any = None  # what the roads follow from
        self._grads = {name: (p.grad, _version(p.grad)) for name, p in parameters.items()}
        self._one_loss_each = False  # known from a batch with several
        self._all_mixed = False  # in every call that a gradient reached
        self.fallback = self.forwards.fallback
        self.roads: dict[str, str] = dict.fromkeys(parameters, UNUSED)
        self.forwards.leave_to_autograd({
            name: f"a {type(p).__name__}, which has no rule"
            for name, p in parameters.items() if is_opaque(p)
        })  # fmt: skip

    def go_on(self, before: Fisher) -> None:
        """Take over the roads and the cost of the part of a run that was scored before."""
        self.forwards.leave_to_autograd(before.fallback)
        self.forwards.reached = True
        self.roads.update(before.roads)
        self.costs.passes.update(before.passes)
        self.costs.seconds.update(before.seconds)

    def add_batch(self, batch: Any, limit: int | None) -> tuple[int, int]:
        """Score at most ``limit`` samples of a batch.

        Returns:
            How many were scored, and how many the batch has.

        Raises:
            NotFinite: the scores are not, and cannot be used any more.
        """
        if is_empty(batch):
            return 0, 0
        probes = self.costs.passes["probe"]
        with self.scoring():
            losses, found = self.forwards.first(batch)
            if len(losses.probe) == 0:
                return 0, 0
            if losses.mean_of is not None and not self._one_loss_each:
                losses, found = self._refuse_mean(losses, losses.mean_of, batch)
            self._one_loss_each |= len(losses.probe) > 1
            losses, found, repeated = self._settled(losses, found, batch)
            size = len(losses.probe)
            counted = size if limit is None else min(limit, size)
            with self._no_autocast():
                rows = losses.rows()
                row = next(rows, None)
                while row is not None:
                    following = next(rows, None)
                    self._add_row(row, counted, found, last=following is None)
                    row = following
                if repeated is not None:
                    repeated.check()
                if not self.scores.settle():
                    raise NotFinite(batch)
        if probes := self.costs.passes["probe"] - probes:
            small_calls = self.interception.small_calls
            self.forwards.leave_to_autograd(small_calls.after_search(size, probes))
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
            self.forwards.random_state,
            self.interception,
        ):
            try:
                yield
            finally:
                self.interception.begin()  # what hooks hold is the graph

    def _no_autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = next(iter(self.parameters.values())).device.type
        return torch.autocast(device, enabled=False)

    def _settled(
        self, losses: Losses, found: Audit, batch: Any
    ) -> tuple[Losses, Audit, Repeated | None]:
        """Give calls their rows; run the forward again while some are caught better later on."""
        while True:
            try:
                with self._no_autocast():
                    repeated = None
                    if found.python and self.rows.is_new(found):
                        inputs = [self.parameters[name] for name in self.fallback]
                        repeated = Repeated(self.backwards, losses.probe, inputs)
                    several = self._find_rows(losses.probe, found)
                if several and self._all_mixed:
                    self._refuse_coupled(several, losses, found, batch)
                if not self._catch_later(several, found):
                    return losses, found, repeated
                why = "a parameter is used before it meets the data"
            except SecondDerivativeError:
                self.forwards.leave_all_to_autograd()
                why = "a hook takes gradients itself"
            losses, found = self.forwards.again(batch, losses, why)

    def _catch_later(self, nodes: list[Any], found: Audit) -> bool:
        """Catch the operands of calls with mixed rows further on, or not at all.

        Returns:
            Whether another forward can catch some of them where they meet the data.
        """
        by_python = [node for node in nodes if node in found.unproven]
        self.forwards.leave_to_autograd(dict.fromkeys(names_of(by_python), _NOT_BY_SAMPLE))
        levels, nodes = self.interception.levels, [n for n in nodes if n not in found.unproven]
        sees_data = set(names_of([node for node in nodes if node.rule.sees_data]))
        early = [n for n in names_of(nodes) if levels[n] == EAGER and n not in sees_data]
        # What seems to be data to other calls may be computed from these.
        if early:
            levels.update(dict.fromkeys(early, LATER))
            return True
        waiting = names_of([node for node in nodes if not node.rule.meets_data])
        if any(levels[name] < LAZY for name in waiting):
            levels.update({n: LAZY for n in names_of(nodes) if levels[n] < LAZY})
            return True
        self.forwards.leave_to_autograd(dict.fromkeys(names_of(nodes), _MIXED))
        return False

    def _find_rows(self, losses: Tensor, found: Audit) -> list[Any]:
        """Give every call its rows; return those where samples mix."""
        unknown = self.rows.known(found, losses)
        return self._probe(unknown, losses, found) if unknown else []

    def _probe(self, nodes: list[Any], losses: Tensor, found: Audit) -> list[Any]:
        def backward(weights: Tensor) -> None:
            self.costs.passes["probe"] += 1
            self.backwards.run((losses * weights).sum(), self.rows.observe)

        with self.costs.of("probe"):
            several, reached = self.rows.find(nodes, found, len(losses), losses, backward)
        told_apart = any(node.rows is not None for node in found.calls if node not in several)
        self._all_mixed = len(several) == len(reached) and not told_apart
        return several

    def _refuse_coupled(self, several: list[Any], losses: Losses, found: Audit, batch: Any) -> None:
        def with_origins() -> Audit:
            return self.forwards.again(batch, losses, "samples mix in every layer", True)[1]

        refuse_coupled([n for n in several if n not in found.unproven], found, with_origins)

    def _refuse_mean(self, losses: Losses, size: int, batch: Any) -> tuple[Losses, Audit]:
        """Refuse one loss for several samples; one that has given several does not take means."""
        losses, found = self.forwards.again(batch, losses, "one loss for several samples", True)
        reached = SamplesReached(size)
        with self.costs.of("probe", passes=1):
            self.backwards.run(losses.probe.sum(), reached.observe)
        if reached.most > 1:
            refuse_mean(size)
        return losses, found

    def _add_row(self, losses: Tensor, counted: int, found: Audit, last: bool) -> None:
        """Score a vector of losses: batched calls, then what is left, one sample at a time."""
        apart = self._apart(found) if self.fallback else set()
        left_out = self._add_batched(losses, counted, found, apart, last)
        self._add_alone(losses[:counted], found, apart | left_out)

    def _apart(self, found: Audit) -> set[int]:
        """Return the groups of uses that have a parameter of the fallback, by identity."""
        return {
            id(group)
            for groups in found.plan.groups
            for group in groups
            if group is not None and not self.fallback.keys().isdisjoint(_names_of(group, found))
        }

    def _add_batched(
        self, losses: Tensor, counted: int, found: Audit, apart: set[int], last: bool
    ) -> set[int]:
        """Score the calls in one backward, but for some groups of uses; return others left out."""
        recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
        if apart:
            every = (group for groups in found.plan.groups for group in groups)
            recorder.only = {id(group) for group in every if group is not None} - apart
        if not found.calls or recorder.only == set():
            return set()
        total = losses[:counted].sum()
        # The graph's memory goes back to the model's own backward, unless it is needed again.
        keep_graph = (
            not last or bool(self.fallback) or bool(found.python)
            or any(n.rows is None for n in found.calls)
        )  # fmt: skip
        observe = recorder.observe
        if found.unproven and counted > 1:
            observe = self._checked(recorder, losses, counted, found)
        while True:
            with self.costs.of("backward", passes=1):
                self.backwards.run(total, observe, keep_graph)
                left_out = recorder.finish()
            if not recorder.unresolved:
                return left_out
            # A call that no gradient had reached before, and whose rows are not known yet.
            if mixed := self._probe(recorder.unresolved, losses, found):
                raise ValueError(COUPLED.format(names_of(mixed)[0]))
            if any(node.rows is None for node in recorder.unresolved):
                return left_out
            recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
            recorder.only, observe = left_out, recorder.observe

    def _checked(self, recorder: Recorder, losses: Tensor, counted: int, found: Audit) -> Any:
        """Record calls behind Python only if each sample's gradient is its own."""
        witness = Witness(self.rows.signature, found.unproven, len(losses), counted)
        with self.costs.of("probe", passes=1):
            weights = witness.weights.to(losses.device, losses.dtype)
            self.backwards.run((losses * weights).sum(), witness.observe)

        def observe(node: Any, x: Tensor | None, grad: Tensor) -> None:
            if witness.agrees(node, grad):
                recorder.observe(node, x, grad)
            else:
                recorder.leave_out(node)
                names = dict.fromkeys(names_of([node]), _NOT_BY_SAMPLE)
                self.forwards.leave_to_autograd(names)

        return observe

    def _add_alone(self, losses: Tensor, found: Audit, groups: set[int]) -> None:
        """One backward per sample, for parameters that no rule covers and some groups of uses.

        Among these are gradients that are too small, or not finite, for rows: one that is rounding
        alone is 0 in one backward and not in another.
        """
        names = list(self.fallback)
        if not names and not groups:
            return
        inputs = [self.parameters[name] for name in names]
        if found.python and found.num_samples > 1:
            self.backwards.refuse_added(losses, inputs, found.python)
        with self.costs.of("fallback" if names else "backward", passes=len(losses)):
            for loss in losses:
                recorder = SampleRecorder(self.interception.tracker, found, groups)
                grads = self.backwards.run(
                    loss, recorder.observe if groups else None, inputs=inputs
                )
                for name, grad in zip(names, grads, strict=True):
                    if grad is not None:
                        recorder.add(name, local(grad, like=self.parameters[name]))
                for name, grad in recorder.total.items():
                    score = self.scores[name]
                    score += self.add.f(grad)
                    self.scores.trim()

    def _note_roads(self, found: Audit) -> None:
        in_order = [node.rows is None or node.rows.layout is not None for node in found.calls]
        pulled_back = self.interception.tracker.pulled_back
        facts = found.plan, in_order, len(self.fallback), len(pulled_back)
        if facts == self._noted:
            return
        self._noted = facts
        for node in found.calls:
            for operand in node.operands:
                if operand is None:
                    continue
                if node.rows is not None and node.rows.layout is None:
                    road = SORTED
                elif operand.region is None or isinstance(node.rule, (BroadcastRule, ScaleRule)):
                    road = EXPANDED
                else:
                    road = BATCHED
                for name in operand.names:
                    if name not in self.fallback:
                        before = self.roads[name].removesuffix(THROUGH)
                        self.roads[name] = max(before, road, key=_ROADS.index)
        for name in pulled_back - self.fallback.keys():
            self.roads[name] = self.roads[name].removesuffix(THROUGH) + THROUGH
        for name, reason in self.fallback.items():
            self.roads[name] = f"{ALONE}: {reason}"

    def finish(self) -> None:
        """Refuse gradients that went past the scores; say which parameters no loss has reached.

        Raises:
            ValueError: a parameter's own ``grad`` has changed.
        """
        for name, (grad, version) in self._grads.items():
            if self.parameters[name].grad is not grad or _version(grad) != version:
                self.parameters[name].grad = grad
                raise ValueError(HIDDEN.format(f"that of {name!r}"))
        unused = [name for name, road in self.roads.items() if road == UNUSED]
        own = {tuple(self.parameters[name].shape) for name in unused}
        others = [shape for of_a_model, shape in self.forwards.others if of_a_model or shape in own]
        if not unused or not others:
            return
        self.roads.update(dict.fromkeys(unused, NOT_REACHED))
        warnings.warn(
            f"no loss reaches {', '.join(map(repr, unused[:3]))}"
            f"{', ...' if len(unused) > 3 else ''}, whose scores are 0, but losses reach trainable "
            f"tensors that are not the model's, of shape {min(others)} for one; if those take the "
            "parameters' place, score the model that loss_fn calls",
            stacklevel=5,
        )


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else grad._version


def _names_of(group: Group, found: Audit) -> set[str]:
    return {name for place, i in group for name in found.calls[place].operands[i].names}
