"""What a tuned model is: the model, its masks, and the base that it was trained from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.base_identity import BaseIdentity
from fishfast.training.gradient.tapped_module import CompactParameter, compact_parameters
from fishfast.training.targets import refuse_later_ties, selected_values
from fishfast.training.values.target import DENSE_GRADIENT_LIMIT

__all__ = ["TuningState"]


class TuningState:
    """A tuned model with its masks and its base; `fishfast.SparseTuning` is the handle on it.

    Attributes:
        model: the model, changed in place.
        mask: the present mask.
        trained_mask: the union of all masks so far: what a delta holds.
        base: the hashes of the model before training.
        base_values: the base's weights under ``trained_mask``, on the CPU.
        dense_gradient_limit: of `train_only`, in bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        base: BaseIdentity,
        trainable: dict[str, bool],
        dense_gradient_limit: int = DENSE_GRADIENT_LIMIT,
    ) -> None:
        self.model, self.mask, self.base = model, mask, base
        self.trained_mask = mask
        # On the CPU, in the weights' dtype: what remask(on_leave="restore") puts back.
        self.base_values = selected_values(model, mask)
        self.dense_gradient_limit = dense_gradient_limit
        self._trainable = trainable  # requires_grad of every parameter before train_only

    def named_parameters(self) -> Iterator[tuple[str, CompactParameter]]:
        """Yield (name, compact parameter); the name is the weight's with ``_values`` appended."""
        yield from compact_parameters(self.model)

    def parameters(self) -> Iterator[CompactParameter]:
        """Yield the compact fp32 parameters, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    def identify(self) -> BaseIdentity:
        """Hash the model as it is now.

        Returns:
            The hashes, without what a delta replaces.

        Raises:
            RuntimeError: names, shapes, dtypes or ties, or weights outside all masks so far, are
                not those of the base.
        """
        refuse_later_ties(self.model)
        now = BaseIdentity.of(self.model, self.trained_mask)
        self.base.refuse_later_ties(now)
        if now.structure != self.base.structure:
            raise RuntimeError(
                "the model's names, dtypes or shapes changed since train_only, so the delta would "
                "fit no base; convert the model before train_only"
            )
        if now.weights != self.base.weights:
            changed = [n for n, text in now.weights.items() if self.base.weights.get(n) != text]
            raise RuntimeError(
                f"weights outside the mask changed since train_only, such as {changed[0]!r}, so "
                "the delta would not give this model again. If the whole model was averaged or "
                "copied (EMA, SWA; rounding moves constant weights): keep p.detach().clone() of "
                "each of tuned.parameters(), load the base checkpoint into the model, copy the "
                "values back into the parameters, and average those alone. If these weights "
                "train: put them into the mask (keep=). If another base checkpoint was loaded, or "
                "DistributedDataParallel sent another rank's weights here: call tuned.rebase() "
                "right after"
            )
        return now
