"""Where the weights and buffers of a delta are in a model: found, read, written. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.gradient.tapped_module import compact_parameters
from fishfast.training.targets import targets_of
from fishfast.training.values.sync import take_changes

__all__ = ["Places"]


class Places:
    """The places of a delta in one model, found by its names, shapes and dtypes.

    Args:
        model: plain or tuned.
        mask: the weights.
        values: name -> what goes to the masked entries.
        buffers: name -> what goes to a buffer.

    Raises:
        ValueError: a model that the delta does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        values: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        # What is not changed need not be a parameter: a checkpoint does not say what is one.
        mask.check_fits(model, selected_only=True)
        self.model, self.targets = model, targets_of(model, mask)
        for name, target in self.targets.items():
            if target.weight().dtype != values[name].dtype:
                raise ValueError(
                    f"the delta must fit the model; {name!r} is {values[name].dtype} in the "
                    f"delta and {target.weight().dtype} in the model"
                )
        present = dict(model.named_buffers(remove_duplicate=False))
        for name, saved in buffers.items():
            buffer = present.get(name)
            if buffer is None or buffer.shape != saved.shape or buffer.dtype != saved.dtype:
                raise ValueError(
                    f"the delta must fit the model; it sets the buffer {name!r}, which the model "
                    "does not have in this shape and dtype"
                )
        self.buffers = {name: present[name] for name in buffers}

    def beside(
        self, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return values and buffers on the devices of their places; nothing is written yet."""
        return (
            {name: values[name].to(target.indices.device) for name, target in self.targets.items()},
            {name: buffers[name].to(buffer.device) for name, buffer in self.buffers.items()},
        )

    def read(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return copies of the masked entries and of the buffers as they are now."""
        return (
            {name: target.gather() for name, target in self.targets.items()},
            {name: buffer.clone() for name, buffer in self.buffers.items()},
        )

    def write(self, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Overwrite the masked entries and the buffers; a model in training goes on from there."""
        with torch.no_grad():
            for name, target in self.targets.items():
                target.scatter_(values[name].to(target.weight().device))
            for name, buffer in self.buffers.items():
                buffer.copy_(buffers[name])
        for _, parameter in compact_parameters(self.model):
            take_changes(parameter)

    def refuse_changed(self, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Refuse a model in which something else than this was written since.

        Args:
            values: what was written to the masked entries.
            buffers: what was written to the buffers.

        Raises:
            RuntimeError: an entry or a buffer that has another value now.
        """
        for name, target in self.targets.items():
            _refuse_changed(name, target.gather(), values[name])
        for name, buffer in self.buffers.items():
            _refuse_changed(name, buffer, buffers[name])


def _refuse_changed(name: str, now: Tensor, applied: Tensor) -> None:
    if not torch.equal(now.cpu(), applied.cpu()):
        raise RuntimeError(
            f"the delta is not on top: {name!r} was changed after apply_ (another delta, or "
            "training); undo that first"
        )
