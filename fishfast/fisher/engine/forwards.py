"""Runs the forward of a batch: once, or again from the same state and with the same losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.fisher.batch_copy import copied_batch
from fishfast.fisher.engine.audit import Audit, audit
from fishfast.fisher.engine.coupling import names_of
from fishfast.fisher.engine.interception import NEVER, Interception, SecondDerivativeError
from fishfast.fisher.engine.origins import Origins
from fishfast.fisher.engine.passes import Costs
from fishfast.fisher.engine.plan import Plans
from fishfast.fisher.objective import Losses, Objective
from fishfast.fisher.untouched import Buffers, OwnRandomState

__all__ = ["Forwards"]


class Forwards:
    """Runs forwards under the interception, and audits their graphs.

    Args:
        model: what is scored.
        objective: what is differentiated.
        interception: of the model's calls.
        plans: of the graphs seen before.
        costs: where passes and time are counted.

    Attributes:
        fallback: name -> reason, for parameters that are left to autograd.
        random_state: from which a model draws.
        reached: whether a loss has reached a parameter, in any batch.
        others: leaves with a gradient that are not the model's: whether they are parameters of
            another one, and their shapes.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, interception: Interception, plans: Plans,
        costs: Costs,
    ) -> None:  # fmt: skip
        self._model, self._objective = model, objective
        self._interception, self._plans, self._costs = interception, plans, costs
        self._parameters = interception.tracker.parameters
        self._buffers: Buffers | None = None  # as the batch found them, once a forward has run
        self.fallback: dict[str, str] = {}
        self.random_state = OwnRandomState(p.device for p in self._parameters.values())
        self._places = _places(model, self._parameters)
        self.reached = False
        self.others: set[tuple[bool, tuple[int, ...]]] = set()

    def leave_to_autograd(self, reasons: Mapping[str, str]) -> None:
        """From the next forward on: checkpoints of this one run again as it has run."""
        self.fallback.update(reasons)

    def leave_all_to_autograd(self) -> None:
        """Leave the whole model: gradients are taken that a cut graph does not have."""
        reason = "loss_fn takes gradients itself"
        self.fallback.update(
            {name: reason for name in self._parameters if name not in self.fallback}
        )

    def first(self, batch: Any) -> tuple[Losses, Audit]:
        """Run the first forward of a batch.

        Args:
            batch: the batch.

        Returns:
            Its losses, and what they depend on.

        Raises:
            ValueError: a parameter was replaced since the batch before.
        """
        for held, key, parameter, name in self._places:
            if held.get(key) is not parameter:
                raise ValueError(
                    f"parameters must stay the same tensors while they are scored; {name!r} was "
                    "replaced between two batches (assign=True, a parametrization, a module put in "
                    "its place); write into it, or score before and after by two calls"
                )
        self._buffers = None
        try:
            losses, found = self.run(batch)
        except SecondDerivativeError:  # broken off: the next two are compared
            self.leave_all_to_autograd()
            losses, found = self.run(batch)
            losses, found = self.again(batch, losses, "it takes gradients itself")
        if self._interception.hooked_late:
            why = "a hook is on a tensor that is computed from a parameter"
            losses, found = self.again(batch, losses, why)
        self._check_reached(found)
        return losses, found

    def run(self, batch: Any) -> tuple[Losses, Audit]:
        """Run a forward; what calls do not cover is left to autograd.

        Args:
            batch: the batch.

        Returns:
            The losses, and what they depend on.

        Raises:
            ValueError: it changes the batch's tensors, or uses those of an earlier forward.
            SecondDerivativeError: ``loss_fn`` called ``backward()``.
        """
        if self._buffers is None:
            self._buffers = Buffers(self._model)
        else:  # a model that counts in its buffers, or draws, does so once for this batch
            self._buffers.put_back()
            self.random_state.start_over()
        interception = self._interception
        interception.begin()
        interception.levels.update(dict.fromkeys(self.fallback, NEVER))
        copied, tensors = copied_batch(batch)
        versions = [tensor._version for tensor in tensors]
        with self._costs.of("forward", passes=1):
            losses = self._objective(self._model, copied)
            if interception.anchor.grad is not None:  # of a backward() in loss_fn
                interception.anchor.grad = None
                raise SecondDerivativeError
            hooked = interception.hooks.settle()
            found = audit(losses.probe, interception.tracker, hooked, self._plans)
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
        self.leave_to_autograd({
            name: f"used by {call}, which has no rule for it"
            for name, call in found.foreign.items()
            if name not in self.fallback and name not in interception.small_calls.given_up
        })  # fmt: skip
        self.leave_to_autograd(interception.small_calls.given_up)
        return losses, found

    def again(
        self, batch: Any, before: Losses, why: str, with_origins: bool = False
    ) -> tuple[Losses, Audit]:
        """Run the forward again.

        Args:
            batch: the batch.
            before: its losses of the forward before.
            why: why it must run again, for the message.
            with_origins: whether calls are told if their inputs come from the model alone.

        Returns:
            The losses, and what they depend on.

        Raises:
            ValueError: the losses are other ones than before.
        """
        if with_origins:
            self._interception.origins = Origins(self._model, copied_batch(batch)[1])
            try:
                with self._interception.origins:
                    losses, found = self.run(batch)
            finally:
                self._interception.origins = None
        else:
            losses, found = self.run(batch)
        self._compare(before.probe.detach(), losses.probe.detach(), why)
        return losses, found

    def _compare(self, old: Tensor, new: Tensor, why: str) -> None:
        """Refuse other losses than before, but for rounding in calls that are caught elsewhere."""
        got = f"{len(old)} losses, then {len(new)}"
        if old.shape == new.shape:
            dtypes = {old.dtype, *(p.dtype for p in self._parameters.values())}
            eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
            differences = (old - new).abs()
            if bool((differences <= min(1000 * eps, 0.05) * old.abs().max()).all()):
                return
            i = int(differences.argmax())
            got = f"{float(old[i]):.6g}, then {float(new[i]):.6g} for sample {i}"
        raise ValueError(
            "loss_fn must give the same losses when it runs again on the same batch, as it has to "
            f"here ({why}); got {got}; something changes from call to call, such as a hidden state "
            "or a counter that the model or loss_fn keeps; set it at the start of each call, or "
            "keep it in the batch"
        )

    def _check_reached(self, found: Audit) -> None:
        """Refuse losses of another model's parameters."""
        anchor = self._interception.anchor
        leaves = [leaf for leaf in found.others if leaf is not anchor]
        self.others.update((isinstance(leaf, nn.Parameter), tuple(leaf.shape)) for leaf in leaves)
        self.reached |= bool(found.calls or found.foreign or found.num_samples == 0)
        if self.reached:
            return
        names = ", ".join(map(repr, list(self._parameters)[:3]))
        raise ValueError(
            f"losses must depend on the model's parameters; none reaches {names}"
            f"{', ...' if len(self._parameters) > 3 else ''}, though other tensors have a "
            "gradient; score the model that loss_fn calls, not another copy of it (an average, a "
            "prepared copy, or one whose weights FSDP keeps elsewhere)"
        )


def _places(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> list[tuple[dict[str, Any], str, Any, str]]:
    """Return where a model has its parameters, and the modules above them.

    Returns:
        A module's dict, the key in it, what is there, and its name in the model.
    """
    tracked = {id(p) for p in parameters.values()}
    found: list[tuple[dict[str, Any], str, Any, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose parameters live elsewhere
            continue
        inside: list[tuple[dict[str, Any], str, Any]] = [
            (module._parameters, key, p)
            for key, p in module._parameters.items() if id(p) in tracked
        ]  # fmt: skip
        inside += [
            (module._modules, key, child)
            for key, child in module._modules.items()
            if child is not None and any(id(p) in tracked for p in child.parameters())
        ]
        found += [(held, key, what, f"{path}.{key}".lstrip(".")) for held, key, what in inside]
    return found
