"""Scores one batch: forward, audit, one backward for intercepted calls, fallback for the rest."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.fisher.batch_copy import copied_batch
from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.alone import SampleRecorder
from fishfast.fisher.engine.audit import Audit, Group, audit
from fishfast.fisher.engine.eager import checkpoints_not_reentrant, not_compiled
from fishfast.fisher.engine.gradients import gradients
from fishfast.fisher.engine.interception import (
    EAGER,
    LAZY,
    NEVER,
    Interception,
    Observer,
    SecondDerivativeError,
)
from fishfast.fisher.engine.probe import RowFinder
from fishfast.fisher.engine.recorder import Recorder
from fishfast.fisher.engine.rows import layouts
from fishfast.fisher.engine.rules import BroadcastRule
from fishfast.fisher.engine.witness import Witness
from fishfast.fisher.objective import Losses, Objective
from fishfast.fisher.result import Fisher
from fishfast.fisher.score_files import WORK
from fishfast.fisher.untouched import Buffers, OwnRandomState

__all__ = ["NotFinite", "Scorer"]

UNUSED, BATCHED = "not used", "batched"
NOT_REACHED = "not reached by losses that reach other tensors"
EXPANDED, SORTED = "batched, where it meets the data", "batched, rows sorted by sample"
ALONE = "one sample at a time"
_ROADS = (
    UNUSED,
    NOT_REACHED,
    BATCHED,
    EXPANDED,
    SORTED,
)  # a parameter's road is the last of those it takes

# Added to a road: weight norm, a recurrent layer over the data itself, a table that is looked up.
THROUGH = "; sample by sample through what is computed from it"

_COUPLED = (
    "loss_fn must return losses that depend on one sample each; the gradient of one loss reaches "
    "other samples in every batched layer, {0!r} for one (a batch mean, or a loss between "
    "samples); use reduction='none'"
)

_NOT_BY_SAMPLE = "a hook or a custom autograd function works on the whole batch's gradient"
_HIDDEN = (
    "layers must not run again inside the backward of a custom autograd function, where their "
    "gradients cannot be told apart; use torch.utils.checkpoint"
)


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
        self.random_state = OwnRandomState(score.device for score in scores.values())
        self._first: tuple[list[str], Tensor] | None = None
        self._other_shapes: set[tuple[int, ...]] = set()
        self.fallback: dict[str, str] = {}
        self.roads: dict[str, str] = dict.fromkeys(parameters, UNUSED)
        self.passes = dict.fromkeys(WORK, 0)
        self.seconds = dict.fromkeys(WORK, 0.0)

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
        with self.scoring():
            self._buffers = None
            losses, found = self._settled(batch)
            size = len(losses.probe)
            counted = size if limit is None else min(limit, size)
            with self._no_autocast():
                rows = losses.rows()
                row = next(rows, None)
                while row is not None:
                    following = next(rows, None)
                    self._add_row(row, counted, found, last=following is None)
                    row = following
                self._check_repeats(losses.probe)
                if not self._is_finite():
                    raise NotFinite(batch)
        self._note_roads(found)
        return counted, size

    def _no_autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = next(iter(self.parameters.values())).device.type
        return torch.autocast(device, enabled=False)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Intercept the model's calls, in this thread: what forward and backward need around them.

        Checkpointed layers that run again inside backward are intercepted, too, on every device.
        """
        with (
            not_compiled(),
            checkpoints_not_reentrant(),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),
            self.random_state,
            self.interception,
        ):
            try:
                yield
            finally:
                self.interception.hooks.clear()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def _settled(self, batch: Any) -> tuple[Losses, Audit]:
        """Run the forward, twice where calls are caught better later on; give calls their rows."""
        try:
            losses, found = self.forward(batch)
        except SecondDerivativeError:
            self._leave_all_to_autograd()
            losses, found = self.forward(batch)
            losses, found = self._again(batch, losses, "it takes gradients itself")
        self._check_reached(found)
        while True:
            try:
                with self._no_autocast():
                    self._note_first_backward(losses.probe, found)
                    if not self._catch_later(self._find_rows(losses.probe, found), found):
                        return losses, found
                why = "a parameter is used before it meets the data"
            except SecondDerivativeError:
                self._leave_all_to_autograd()
                why = "a hook takes gradients itself"
            losses, found = self._again(batch, losses, why)

    def forward(self, batch: Any) -> tuple[Losses, Audit]:
        """Run the forward once; what calls do not cover is left to autograd."""
        if self._buffers is None:
            self._buffers = Buffers(self.model)
        else:  # a model that counts in its buffers, or draws, does so once for this batch
            self._buffers.put_back()
            self.random_state.start_over()
        copied, tensors = copied_batch(batch)
        versions = [tensor._version for tensor in tensors]
        self.passes["forward"] += 1
        self.interception.most_rows = 1
        self.interception.hooks.clear()
        self.interception.levels.update(dict.fromkeys(self.fallback, NEVER))
        with self._timed("forward"):
            losses = self.objective(self.model, copied)
            hooked = self.interception.hooks.settle()
            found = audit(losses.probe, self.interception.tracker, hooked)
        if versions != [tensor._version for tensor in tensors]:
            raise ValueError(
                "loss_fn must leave the batch's tensors as they are, because a forward may run "
                "again; it changed one in place; work on a copy"
            )
        stale = [name for name in _names(found.calls) if name in self.fallback]
        if stale:
            raise ValueError(
                "a model must not use tensors of an earlier forward, such as cached features; "
                f"it does, behind {stale[0]!r}; clear them before scoring"
            )
        self._leave_to_autograd({
            name: f"used by {call}, which has no rule for it"
            for name, call in found.foreign.items()
            if name not in self.fallback
        })  # fmt: skip
        return losses, found

    def _again(self, batch: Any, before: Losses, why: str) -> tuple[Losses, Audit]:
        """Run the forward again, which must give the same losses."""
        old = before.probe.detach()
        losses, found = self.forward(batch)
        new = losses.probe.detach()
        if not _are_equal(old, new, self.parameters.values()):
            first, second = "other numbers of losses", ""
            if old.shape == new.shape:
                index = int((old - new).abs().argmax())
                first, second = f"{float(old[index]):.6g}, then ", f"{float(new[index]):.6g}"
                second += f" for sample {index}"
            raise ValueError(
                "loss_fn must give the same losses when it runs again on the same batch, as it has "
                f"to here ({why}); got {first}{second}; something changes from call to call, such "
                "as a hidden state or a counter that the model or loss_fn keeps; set it at the "
                "start of each call, or keep it in the batch"
            )
        return losses, found

    def _check_reached(self, found: Audit) -> None:
        """Refuse losses of another model's parameters."""
        others = [leaf for leaf in found.others if leaf is not self.interception.anchor]
        self._other_shapes.update(tuple(leaf.shape) for leaf in others)
        if found.calls or found.foreign or any(road != UNUSED for road in self.roads.values()):
            return
        names = ", ".join(map(repr, list(self.parameters)[:3]))
        raise ValueError(
            f"losses must depend on the model's parameters; none reaches {names}"
            f"{', ...' if len(self.parameters) > 3 else ''}, though other tensors have a gradient; "
            "score the model that loss_fn calls, not another copy of it (an average, a prepared "
            "or compiled copy, or one whose weights FSDP keeps elsewhere)"
        )

    def note_unreached(self) -> None:
        """Say which parameters no loss has reached, where the losses reach others instead."""
        unused = [name for name, road in self.roads.items() if road == UNUSED]
        if not unused or not self._other_shapes:
            return
        self.roads.update(dict.fromkeys(unused, NOT_REACHED))
        warnings.warn(
            f"no loss reaches {', '.join(map(repr, unused[:3]))}"
            f"{', ...' if len(unused) > 3 else ''}, whose scores are 0, but losses reach trainable "
            f"tensors that are not the model's, of shape {min(self._other_shapes)} for one; if "
            "those take the parameters' place, score the model that loss_fn calls",
            stacklevel=5,
        )

    def _leave_to_autograd(self, reasons: Mapping[str, str]) -> None:
        """From the next forward on; checkpoints of this one run again as it has run."""
        self.fallback.update(reasons)

    def _leave_all_to_autograd(self) -> None:
        reason = "loss_fn takes gradients itself"
        self._leave_to_autograd(
            {name: reason for name in self.parameters if name not in self.fallback}
        )

    def _catch_later(self, nodes: list[Any], found: Audit) -> bool:
        """Catch the operands of calls with mixed rows further on, or not at all.

        Returns:
            Whether another forward can catch some of them where they meet the data.
        """
        later = False
        self._leave_to_autograd(
            dict.fromkeys(_names([n for n in nodes if n in found.unproven]), _NOT_BY_SAMPLE)
        )
        nodes = [node for node in nodes if node not in found.unproven]
        for node in nodes:
            names = _names([node])
            eager = all(self.interception.levels[name] == EAGER for name in names)
            if eager and not node.rule.meets_data:
                self.interception.levels.update(dict.fromkeys(names, LAZY))
                later = True
        for name in _names(nodes):
            if self.interception.levels[name] == EAGER or not later:
                reason = "the gradient of one loss reaches several rows of its call"
                self._leave_to_autograd({name: reason})
        return later

    def _find_rows(self, losses: Tensor, found: Audit) -> list[Any]:
        """Give every call its rows; return those where samples mix."""
        unknown = self.rows.known(found, losses)
        return self._probe(unknown, losses, found) if unknown else []

    def _probe(self, nodes: list[Any], losses: Tensor, found: Audit) -> list[Any]:
        def backward(weights: Tensor) -> None:
            self.passes["probe"] += 1
            self.backward((losses * weights).sum(), self.rows.observe)

        with self._timed("probe"):
            several, reached = self.rows.find(nodes, found, len(losses), losses, backward)
        # Only a call that could have the samples in its rows says something about the losses.
        telling = [
            node for node in several
            if not isinstance(node.rule, BroadcastRule) and layouts(node.lead, len(losses))
            and node not in found.unproven
        ]  # fmt: skip
        told_apart = any(node.rows is not None for node in found.calls if node not in several)
        if telling and len(several) == len(reached) and not told_apart:
            raise ValueError(_COUPLED.format(_names(telling)[0]))
        return several

    def _add_row(self, losses: Tensor, counted: int, found: Audit, last: bool) -> None:
        """Score a vector of losses: batched calls, then what is left, one sample at a time."""
        apart = {
            id(group)
            for groups in found.groups.values()
            for group in groups
            if group is not None and not self.fallback.keys().isdisjoint(_names_of(group))
        }
        left_out = self._add_batched(losses, counted, found, apart, last)
        self._add_alone(losses[:counted], found, apart | left_out)

    def _add_batched(
        self, losses: Tensor, counted: int, found: Audit, apart: set[int], last: bool
    ) -> set[int]:
        """Score the calls in one backward, but for some groups of uses; return others left out."""
        recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
        if apart:
            every = (group for groups in found.groups.values() for group in groups)
            recorder.only = {id(group) for group in every if group is not None} - apart
        if not found.calls or recorder.only == set():
            return set()
        total = losses[:counted].sum()
        # The graph's memory goes back to the model's own backward, unless it is needed again.
        keep_graph = (
            not last or bool(self.fallback) or bool(found.python)
            or any(n.rows is None for n in found.calls)
        )  # fmt: skip
        witness = self._witness(losses, counted, found)

        def observe(node: Any, x: Tensor | None, grad: Tensor) -> None:
            if witness is not None and not witness.agrees(node, grad):
                recorder.leave_out(node)
                self._leave_to_autograd(dict.fromkeys(_names([node]), _NOT_BY_SAMPLE))
                return
            recorder.observe(node, x, grad)

        while True:
            self.passes["backward"] += 1
            with self._timed("backward"):
                self.backward(total, observe, keep_graph)
                left_out = recorder.finish()
            if not recorder.unresolved:
                return left_out
            # A call that no gradient had reached before, and whose rows are not known yet.
            if mixed := self._probe(recorder.unresolved, losses, found):
                raise ValueError(_COUPLED.format(_names(mixed)[0]))
            if any(node.rows is None for node in recorder.unresolved):
                return left_out
            recorder = Recorder(self.interception.tracker, self.scores, self.add, found)
            recorder.only = left_out

    def _witness(self, losses: Tensor, counted: int, found: Audit) -> Witness | None:
        """Look at gradients of other losses' weights, where Python stands between."""
        if not found.unproven or counted < 2:
            return None
        witness = Witness(self.rows.signature, found.unproven, len(losses), counted)
        self.passes["probe"] += 1
        with self._timed("probe"):
            weights = witness.weights.to(losses.device, losses.dtype)
            self.backward((losses * weights).sum(), witness.observe)
        return witness

    def _note_first_backward(self, losses: Tensor, found: Audit) -> None:
        """Keep what the first backward through Python gives, to compare a later one with it."""
        self._first = None
        if found.python and self.rows.is_new(found):
            names = list(self.fallback)
            self._first = (names, self._sizes(losses, names))

    def _check_repeats(self, losses: Tensor) -> None:
        """Refuse a backward that is another one when it runs again."""
        if self._first is None:
            return
        names, first = self._first
        if not torch.allclose(self._sizes(losses, names), first, rtol=1e-3, atol=0, equal_nan=True):
            raise ValueError(
                "gradients must be the same when a backward runs again over one graph; they are "
                "not, behind a hook or a custom autograd function that keeps something from call "
                "to call; nothing of this call was kept; make it forget, or give batches of one "
                "sample and take the gradients in a loop"
            )

    def _sizes(self, losses: Tensor, names: list[str]) -> Tensor:
        """Return the size of each call's gradient, and of those of parameters."""
        sizes: list[Tensor] = []

        def observe(node: Any, x: Tensor | None, grad: Tensor) -> None:
            sizes.append(grad.double().norm())

        self.passes["probe"] += 1
        with self._timed("probe"):
            inputs = [self.parameters[name] for name in names]
            grads = self.backward(losses.sum(), observe, inputs=inputs)[: len(names)]
        sizes += [grad.double().norm() for grad in grads if grad is not None]
        return torch.stack([size.cpu() for size in sizes] or [torch.zeros(())])

    def _add_alone(self, losses: Tensor, found: Audit, groups: set[int]) -> None:
        """One backward per sample, for parameters that no rule covers and some groups of uses.

        Among these are gradients that are too small, or not finite, for rows: one that is rounding
        alone is 0 in one backward and not in another.
        """
        names = list(self.fallback)
        if not names and not groups:
            return
        inputs = [self.parameters[name] for name in names]
        phase = "fallback" if names else "backward"
        with self._timed(phase):
            for loss in losses:
                self.passes[phase] += 1
                recorder = SampleRecorder(self.interception.tracker, found, groups)
                grads = self.backward(loss, recorder.observe if groups else None, inputs=inputs)
                for name, grad in zip(names, grads, strict=False):
                    if grad is not None:
                        recorder.add(name, grad)
                for name, grad in recorder.total.items():
                    self.scores[name] += self.add.f(grad)

    def backward(
        self, loss: Tensor, observe: Observer | None, keep_graph: bool = True,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Run the backward of all intercepted calls; their weights' gradients are not computed.

        Returns:
            The gradients of ``inputs``.
        """
        interception, anchor = self.interception, self.interception.anchor
        interception.hooks.rearm()
        interception.observe = observe

        def note_task(_: Any) -> None:
            interception.task = torch._C._current_graph_task_id()

        node: Any = loss.grad_fn
        handle = node.register_prehook(note_task)
        try:
            inputs = [*inputs, anchor] if observe is not None else inputs
            grads = gradients(loss, inputs, keep_graph=keep_graph)
        finally:
            handle.remove()
            interception.observe, interception.task = None, -1
        if anchor.grad is not None:
            anchor.grad = None
            raise ValueError(_HIDDEN)
        return grads

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


def _are_equal(old: Tensor, new: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether losses are the same, but for rounding in calls that are caught elsewhere."""
    if old.shape != new.shape:
        return False
    eps = max(torch.finfo(t.dtype).eps for t in (old, *parameters))
    return bool(((old - new).abs() <= min(1000 * eps, 0.05) * old.abs().max()).all())


def _names_of(group: Group) -> set[str]:
    return {name for node, i in group for name in node.operands[i].names}


def _names(nodes: list[Any]) -> list[str]:
    """Return the names of all operands of these calls."""
    operands = [operand for node in nodes for operand in node.operands if operand is not None]
    return sorted({name for operand in operands for name in operand.names})
