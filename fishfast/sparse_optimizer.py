"""What the optimizers share: the torch.optim contract around one launch for all parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fishfast import _backend
from fishfast.compact import CompactParameter, Target, refuse_retired
from fishfast.masters import add_masters, parameters_in_order, take_masters

__all__ = ["SparseOptimizer", "Update", "require_not_negative"]

# Dtypes that a masked weight may have.
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Options of torch's optimizers that change what a step is, and why there are none here.
_UNSUPPORTED = {
    "capturable": "learning rate and step count are read on the host; step outside the CUDA graph",
    "differentiable": "weights are written in place, past autograd",
}


def require_not_negative(**options: float | Tensor) -> None:
    """Check numbers, or tensors with one element.

    Args:
        **options: the value of each option.

    Raises:
        ValueError: a negative number, NaN, or a tensor with another number of elements.
    """
    for name, value in options.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor with one element; got shape "
                f"{tuple(value.shape)}"
            )
        if not float(value) >= 0:
            raise ValueError(f"{name} must be at least 0; got {value}")


class Update:
    """One parameter's part in a step.

    Attributes:
        values: the compact parameter, or a plain fp32 one.
        grad: its gradient, contiguous.
        state: the optimizer's state of it.
        group: its param group.
        target: where the values go; None for a plain parameter.
        weight: the target's weight.
    """

    def __init__(self, values: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert values.grad is not None
        if values.grad.layout != torch.strided or values.grad.dtype != torch.float32:
            raise RuntimeError(
                f"gradients must be dense float32; got {values.grad.dtype}, {values.grad.layout}"
            )
        if not values.is_contiguous():
            raise RuntimeError(
                "parameters must be contiguous; got one of shape "
                f"{tuple(values.shape)} and strides {values.stride()}"
            )
        self.values, self.state, self.group = values, state, group
        self.grad = values.grad.contiguous()
        self.target: Target | None = getattr(values, "target", None)
        self.weight = None if self.target is None else self.target.weight()
        if isinstance(values, CompactParameter):
            values.follow_()
        if self.weight is not None and self.weight.dtype not in _WEIGHT_DTYPES:
            raise RuntimeError(
                "masked weights must be float32, bfloat16 or float16; the model was moved to "
                f"{self.weight.dtype} after train_only"
            )
        if self.weight is not None and self.weight.device != values.device:
            raise RuntimeError(
                f"a masked weight is on {self.weight.device} and its compact parameter on "
                f"{values.device}; move the whole model with model.to()"
            )

        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.device != values.device:
                raise RuntimeError(
                    f"state must be where its parameter is; got {name!r} on {value.device} and a "
                    f"parameter on {values.device}; make the optimizer after model.to()"
                )

    def lr(self) -> Any:
        """Return the learning rate; one on a GPU costs a synchronisation.

        A tensor stays one: what torch computes from it is rounded to its dtype.
        """
        lr = self.group["lr"]
        return lr.cpu() if isinstance(lr, Tensor) else lr


class SparseOptimizer(Optimizer, ABC):
    """Base of `Adam`, `AdamW` and `SGD`: checks, loss scaling, masters in the state dict.

    Args:
        params: compact parameters from ``tuned.parameters()``; plain contiguous fp32 parameters
            are accepted too and trained densely, frozen parameters are accepted and left alone.
        defaults: the options of a param group.
        backend: ``"auto"``, ``"cuda"``, ``"cpu"`` or ``"torch"``.
    """

    _operation: str  # key of the backend table
    _former_options: dict[str, Any]  # what a state without one of these options means
    _step_supports_amp_scaling = True  # GradScaler hands over found_inf and grad_scale

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], backend: str = "auto"
    ) -> None:
        self._backend = backend
        if hasattr(params, "parameters"):
            raise TypeError(
                f"params must be an iterable of parameters; got a {type(params).__name__}; "
                "pass its .parameters()"
            )
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                _backend.choose(self._operation, parameter.device, backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, copy or load a state; an older one may lack options."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._former_options.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy with the backend, which torch's own list of attributes leaves out."""
        return {**super().__getstate__(), "_backend": self._backend}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of compact or plain fp32 parameters.

        Args:
            param_group: as for any torch optimizer.

        Raises:
            ValueError: a trainable parameter of another dtype, one that is not contiguous, or an
                option that this optimizer does not have.
        """
        held = len(self.param_groups)
        options = {**self.defaults, **param_group}
        for name, reason in _UNSUPPORTED.items():
            if options.get(name):
                raise ValueError(f"{name} must be False; got {options[name]}: {reason}")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.requires_grad or isinstance(parameter, CompactParameter):
                continue
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                del self.param_groups[held:]
                raise ValueError(
                    "params must be compact parameters or contiguous float32 ones; got "
                    f"{parameter.dtype} of shape {tuple(parameter.shape)}; pass tuned.parameters()"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and write the result into the weights.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient or weight that cannot be updated, or a CUDA graph that is being
                captured; nothing was changed.
        """
        refuse_retired(parameters_in_order(self))
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"step() cannot be captured: {_UNSUPPORTED['capturable']}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return loss  # overflow: no update, and no step is counted
        scale = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if scale is None else float(scale)

        updates: dict[torch.device, list[Update]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = Update(parameter, self.state[parameter], group)
                    updates.setdefault(parameter.device, []).append(update)
        for device, batch in updates.items():
            self._advance(batch)
            chosen = _backend.choose(self._operation, device, self._backend)
            if chosen == "torch":
                for update in batch:
                    self._update_torch(update, grad_scale)
                    if update.target is not None:
                        update.target.scatter_(update.values)
            else:
                self._update_compiled(batch, grad_scale, device, chosen)
                # Raw pointers do not tell autograd that these changed.
                written = [t for update in batch for t in (update.values, update.weight)]
                torch.autograd.graph.increment_version([t for t in written if t is not None])
                for update in batch:
                    if update.target is not None:
                        update.target.mark_seen()
        return loss

    @abstractmethod
    def _advance(self, updates: list[Update]) -> None:
        """Make missing state and count the step."""

    @abstractmethod
    def _update_torch(self, update: Update, grad_scale: float) -> None:
        """Update one parameter with torch operations; the caller scatters."""

    @abstractmethod
    def _update_compiled(
        self, updates: list[Update], grad_scale: float, device: torch.device, backend: str
    ) -> None:
        """Update and scatter all parameters of one device in one call."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the fp32 masters of weights that hold fewer bits.

        Returns:
            As any torch optimizer; loads into torch's own optimizer of the same name over the
            compact parameters, and theirs loads here.
        """
        saved = super().state_dict()
        add_masters(self, saved)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; masters are taken over where they round to the present weights.

        So load the model first, then the optimizer, as usual.

        Args:
            state_dict: from ``state_dict()`` of this optimizer or torch's of the same name.

        Raises:
            ValueError: the state of another mask. Nothing was changed.
        """
        # The last of the hooks: it sees what the user's own made of the state.
        last = self.register_load_state_dict_pre_hook(lambda _, state: self._check_shapes(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        for group in self.param_groups:  # how torch ran it is not how this optimizer runs
            group.update(dict.fromkeys(_UNSUPPORTED.keys() & group.keys(), False))
        for parameter in parameters_in_order(self):
            state = self.state.get(parameter, {})
            for name, value in state.items():
                if name == "step":  # a number in old states; on the GPU with capturable or fused
                    state[name] = torch.as_tensor(value, dtype=torch.float32).cpu().clone()
                elif isinstance(value, Tensor):
                    # A copy, or a live optimizer's state would move with this one's. torch's has
                    # its parameter's strides.
                    state[name] = value.clone(memory_format=torch.contiguous_format)
        take_masters(self)

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """The compiled step trusts that state is as long as its parameter."""
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, parameter in zip(saved, parameters_in_order(self), strict=False):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"state_dict must fit the parameters; got {name!r} of shape "
                        f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; "
                        "was it saved with another mask?"
                    )
