"""What the optimizers share: the torch.optim contract around one launch for all parameters."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fishfast import _backend
from fishfast.optim.capturable import Tables, learning_rate, refuse_devices
from fishfast.optim.flat_state import apart
from fishfast.optim.kept_step import KeptStep
from fishfast.optim.options import (
    UNSUPPORTED,
    check_numbers,
    refuse_other_parameter,
    refuse_unsupported,
)
from fishfast.optim.step_table import fill_scalars, launch, make_rows
from fishfast.optim.update import Update, count_versions, is_capturing, refuse_not_finite
from fishfast.training.gradient.tapped_module import CompactParameter
from fishfast.training.optimizer_state import (
    add_masters,
    keep_masters,
    own,
    parameters_in_order,
    refuse_other_mask,
    take_masters,
)
from fishfast.training.values.retired import refuse_retired
from fishfast.training.values.sync import follow, write

__all__ = ["SparseOptimizer"]


@functools.cache
def _keep_out_of_compiled_graphs() -> None:
    """Make a step one graph break of compiled code, which cannot trace tables of addresses.

    Done when the first optimizer is made and not at import: it takes Dynamo, which loads for
    seconds and which torch's optimizers load at that time, too.
    """
    SparseOptimizer._step = torch.compiler.disable(SparseOptimizer._step)  # type: ignore[method-assign]


class SparseOptimizer(Optimizer, ABC):
    """Base of `Adam`, `AdamW` and `SGD`: checks, loss scaling, masters in the state dict.

    Args:
        params: compact parameters from ``tuned.parameters()``; plain contiguous fp32 parameters
            are accepted too and trained densely, frozen parameters are accepted and left alone.
        defaults: the options of a param group.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` or ``"torch"``.
        check_finite: look at every gradient before a step.

    Attributes:
        writes_weights: its step writes what it computes into the weights itself.
    """

    _operation: str  # key of the backend table
    _state_names: tuple[str, ...]  # what kernels read by address, in the order of a row
    _row: np.dtype  # of the table of a step, from `row_dtype`
    _plan: np.dtype  # of what a capturable step computes a row's numbers from
    _numbers: tuple[str, ...]  # options that are one
    _former_options: dict[str, Any]  # what a state without one of these options means
    writes_weights = True  # so `fishfast.training.values.sync` has nothing to do
    _step_supports_amp_scaling = True  # GradScaler hands over found_inf and grad_scale

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        backend: str = "auto",
        check_finite: bool = False,
    ) -> None:
        self._backend, self._check_finite = backend, check_finite
        self._tables = Tables()
        self._kept: KeptStep | None = None  # the last step, if it can be taken again
        self._checked_in_a_row = 0  # how many steps were not kept ones, since the last that was
        if hasattr(params, "parameters"):
            raise TypeError(
                f"params must be an iterable of parameters; got a {type(params).__name__}; "
                "pass its .parameters()"
            )
        super().__init__(params, defaults)
        _keep_out_of_compiled_graphs()
        for group in self.param_groups:
            for parameter in group["params"]:
                _backend.choose(self._operation, parameter.device, backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, copy or load a state; an older one may lack options."""
        super().__setstate__(state)
        _keep_out_of_compiled_graphs()
        if "_tables" not in self.__dict__:  # a copy, which starts without
            self._tables = Tables()
        self.__dict__.setdefault("_check_finite", False)
        self._tables.forget()
        self._kept, self._checked_in_a_row = None, 0
        for group in self.param_groups:
            for name, value in self._former_options.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy with what torch's own list of attributes leaves out."""
        own = {"_backend": self._backend, "_check_finite": self._check_finite}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of compact or plain fp32 parameters.

        Args:
            param_group: as for any torch optimizer.

        Raises:
            ValueError: a trainable parameter of another dtype, one that is not contiguous, or an
                option that this optimizer does not have, or not for these parameters.
            TypeError: ``betas`` that are no pair.
            RuntimeError: the backend that was asked for by name cannot run on their device.
        """
        held = len(self.param_groups)
        options = {**self.defaults, **param_group}
        refuse_unsupported(options)
        super().add_param_group(param_group)
        try:
            self._refuse_options(self.param_groups[-1])
            for parameter in self.param_groups[-1]["params"]:
                if options["capturable"]:
                    self._refuse_capturable(parameter.device)
                if parameter.requires_grad:
                    refuse_other_parameter(parameter)
        except (RuntimeError, TypeError, ValueError):
            del self.param_groups[held:]
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and write the result into the weights.

        With ``capturable=True`` in every group a CUDA graph can hold it, after one step like it
        outside the capture. A replay reads gradients, masters, state, a tensor ``lr``,
        ``found_inf`` and ``grad_scale`` where they were at the capture. It does not see, so capture
        again after: another ``lr`` that is a number or on the CPU, or any other option; a weight
        that was replaced or moved, or written to by hand (its masters would undo that; loading a
        state dict into the model takes them along); a loaded optimizer state, a remask or a new
        group.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient, weight or state that cannot be updated; a CUDA graph is
                captured and the step is not capturable, or differs from the one before the capture.
                Nothing was changed.
            ValueError: a capturable step of parameters that left the GPU, or an option of a group
                that is no number or out of range. Nothing was changed.
        """
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if is_capturing():
            self._refuse_capture()
        loss = None
        if closure is not None:
            refuse_retired(parameters_in_order(self))
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        on_host = not all(group["capturable"] for group in self.param_groups)
        if on_host and found_inf is not None and bool(found_inf):
            refuse_retired(parameters_in_order(self))
            return loss  # overflow: no update, and no step is counted
        grad_scale = float(scale) if on_host and scale is not None else 1.0

        # Taken away meanwhile: another thread's step must not share its table.
        kept, self._kept = self._kept, None
        if kept is not None and kept.take(self, grad_scale):
            self._kept, self._checked_in_a_row = kept, 0
        else:
            self._checked_in_a_row += 1
            self._kept = self._checked_step(grad_scale, (found_inf, scale))
        return loss

    def _checked_step(
        self, grad_scale: float, scaling: tuple[Tensor | None, Tensor | None]
    ) -> KeptStep | None:
        """Take a step in which everything is checked; return it, if it can be kept."""
        refuse_retired(parameters_in_order(self))
        batches = self._checked_batches()
        chosen_for = {
            device: _backend.choose(self._operation, device, self._backend) for device, _ in batches
        }
        kept = None
        # Nothing was changed so far, and what follows does not fail.
        for (device, capturable), updates in batches.items():
            for update in updates:
                if update.is_stale:
                    follow(update.values)  # type: ignore[arg-type]
            self._advance(updates)
            if (backend := chosen_for[device]) == "torch":
                for update in updates:
                    self._update_torch(update, grad_scale)
                    if isinstance(update.values, CompactParameter):
                        write([update.values])
                keep_masters(self)
                continue
            if capturable:
                self._update_capturable(updates, scaling)
                count_versions(updates)
                keep_masters(self)
                continue
            rows, held = self._rows(updates, grad_scale)
            counts = tuple(update.plain.numel() for update in updates)
            launch(self._operation, rows, counts, device, backend)
            count_versions(updates)
            keep_masters(self)
            # To keep a step takes half as long as to check it. Where every step is checked, because
            # weights are always written to in between, it is tried ever more seldom.
            is_turn = self._checked_in_a_row.bit_count() == 1
            if is_turn and len(batches) == 1 and KeptStep.fits(self, updates):
                if absent := self._absent(updates):
                    updates = [*updates, *absent]
                    rows, held = make_rows(self._row, updates, self._used_states, self._state_names)
                kept = KeptStep(self, rows, updates, held, backend)
            # else of a GPU's tensors in `held` the stream orders the reuse after the kernel
        return kept

    def _absent(self, updates: list[Update]) -> list[Update]:
        """Return those that had no gradient in this step and may have one in the next, as experts.

        One that a step could not take is left out, for the step that comes to it to refuse.
        """
        present = {id(update.values) for update in updates}
        counted = ("step",) if "step" in updates[0].state else ()
        absent = []
        for group in self.param_groups:
            needed = (*self._used_states(group), *counted)
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if id(parameter) in present or state is None or any(n not in state for n in needed):
                    continue
                try:
                    update = Update(parameter, state, group, self._state_names)
                except RuntimeError:
                    continue
                if update.plain.device == updates[0].plain.device and KeptStep.fits(self, [update]):
                    absent.append(update)
        return absent

    def _rows(self, updates: list[Update], grad_scale: float) -> tuple[np.ndarray, list[Tensor]]:
        """Return the table of a step, and tensors to keep until it was read."""
        rows, held = make_rows(self._row, updates, self._used_states, self._state_names)
        counted = "step" in updates[0].state
        steps = [float(update.state["step"]) for update in updates] if counted else None
        fill_scalars(
            rows, updates, lambda group, step: self._scalars(group, step, grad_scale), steps
        )
        return rows, held

    def _update_capturable(
        self, updates: list[Update], scaling: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Update with found_inf, grad_scale and all that changes read on the device."""
        rows, held = make_rows(self._row, updates, self._used_states, self._state_names)
        fill_scalars(rows, updates, lambda group, _: self._constant_scalars(group))
        plans = np.zeros(len(updates), self._plan)
        plans["step"] = [
            update.state["step"].data_ptr() if self._used_states(update.group) else 0
            for update in updates
        ]
        plans["lr"] = [learning_rate(update) for update in updates]
        self._fill_plans(plans, [update.group for update in updates])
        self._tables.launch(self._operation, rows, plans, updates, scaling, held)

    def _checked_batches(self) -> dict[tuple[torch.device, bool], list[Update]]:
        """Return what has a gradient, checked, by its device and whether it is capturable."""
        batches: dict[tuple[torch.device, bool], list[Update]] = {}
        for group in self.param_groups:
            self._refuse_options(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = Update(parameter, self.state[parameter], group, self._state_names)
                    kind = parameter.device, bool(group["capturable"])
                    batches.setdefault(kind, []).append(update)
        for (device, capturable), updates in batches.items():
            if capturable:
                self._refuse_capturable(device)
                for update in {id(update.group): update for update in updates}.values():
                    learning_rate(update)
            elif self._check_finite:
                refuse_not_finite(updates)
        return batches

    def _refuse_options(self, group: dict[str, Any]) -> None:
        """Refuse what a param group was given since, before anything is changed."""
        check_numbers(group, self._numbers)

    def _refuse_capturable(self, device: torch.device) -> None:
        if self._check_finite:
            raise ValueError(
                "check_finite must be False with capturable=True; got True: it looks at the "
                "gradients on the host"
            )
        refuse_devices(self._operation, device, self._backend)

    def _refuse_capture(self) -> None:
        for group in self.param_groups:
            if not group["capturable"]:
                raise RuntimeError(
                    "step() cannot be captured with capturable=False in a param group: its step "
                    "reads learning rate and overflow on the host; make the optimizer with "
                    "capturable=True, or step outside the CUDA graph"
                )

    @abstractmethod
    def _advance(self, updates: list[Update]) -> None:
        """Make missing state and, unless the device does, count the step."""

    @abstractmethod
    def _update_torch(self, update: Update, grad_scale: float) -> None:
        """Update one parameter with torch operations; the caller scatters."""

    @abstractmethod
    def _used_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state that a step with a group's options reads."""

    @abstractmethod
    def _scalars(self, group: dict[str, Any], step: float, grad_scale: float) -> tuple[Any, ...]:
        """Return the numbers of a row, in double: those of a group after so many steps."""

    @abstractmethod
    def _constant_scalars(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return the numbers of a capturable row; what its plan gives is 0."""

    def _fill_plans(self, plans: np.ndarray, groups: list[dict[str, Any]]) -> None:
        """Fill what a capturable row's numbers are computed from, beside step and lr."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the fp32 masters of weights that hold fewer bits.

        Returns:
            As any torch optimizer; loads into torch's own optimizer of the same name over the
            compact parameters, and theirs loads here.
        """
        saved = super().state_dict()
        saved["state"] = {index: apart(state) for index, state in saved["state"].items()}
        add_masters(self, saved)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; masters are taken over where they round to the present weights.

        So load the model first, then the optimizer, as usual. Whether a group is capturable stays
        as it is here. CUDA graphs go on with the state of before: capture them again.

        Args:
            state_dict: from ``state_dict()`` of this optimizer or torch's of the same name.

        Raises:
            ValueError: the state of another mask. Nothing was changed.
        """
        capturable = [group["capturable"] for group in self.param_groups]
        # The last of the hooks: it sees what the user's own made of the state.
        last = self.register_load_state_dict_pre_hook(refuse_other_mask)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        # How it ran where it was saved is not how this optimizer runs.
        for group, as_before in zip(self.param_groups, capturable, strict=True):
            group.update(dict.fromkeys(UNSUPPORTED.keys() & group.keys(), False))
            group["capturable"] = as_before
            for parameter in group["params"]:
                own(
                    self.state.get(parameter, {}),
                    device_of_step=parameter.device if as_before else torch.device("cpu"),
                )
        take_masters(self)
