"""`SparseTuning`: the handle on a model that trains only the weights of a mask."""

from __future__ import annotations

from collections.abc import Iterator

from tabulate import tabulate
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from fishfast.base_identity import BaseIdentity
from fishfast.compact import VALUES_SUFFIX, CompactParameter, compact_parameters, untap
from fishfast.mask import SparseMask
from fishfast.masters import add_masters, parameters_in_order, take_masters

__all__ = ["Attachment", "SparseTuning"]


class Attachment:
    """What `SparseTuning.attach` added to an optimizer."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take it off again."""
        for handle in self._handles:
            handle.remove()


class SparseTuning:
    """The handle on a model that trains only its masked weights.

    Attributes:
        model: the model, changed in place; it runs the forward as before.
        mask: the mask.
        base: the hashes of the model before training.
    """

    def __init__(
        self, model: nn.Module, mask: SparseMask, base: BaseIdentity, trainable: dict[str, bool]
    ) -> None:
        self.model, self.mask, self.base = model, mask, base
        self._trainable = trainable  # requires_grad of every parameter before train_only

    def named_parameters(self) -> Iterator[tuple[str, CompactParameter]]:
        """Yield (name, compact parameter); the name is the weight's with ``_values`` appended."""
        yield from compact_parameters(self.model)

    def parameters(self) -> Iterator[CompactParameter]:
        """Yield the compact fp32 parameters, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_selected(self) -> int:
        """Number of trained weights, k."""
        return self.mask.num_selected

    def __repr__(self) -> str:
        return f"SparseTuning({type(self.model).__name__}, {self.mask!r})"

    def report(self) -> str:
        """Return a table: each trained weight, its dtype, and how its gradient is caught."""
        rows = [
            (name.removesuffix(VALUES_SUFFIX), str(p.target.weight().dtype), f"{len(p):,}", "tap")
            for name, p in self.named_parameters()
        ]
        return tabulate(
            rows, headers=("parameter", "dtype", "trained", "road"), disable_numparse=True,
            colalign=("left", "left", "right", "left"),
        )  # fmt: skip

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many weights train and how many the base model has, as PEFT's method does.

        The compact parameters are copies of weights, so they are not counted again in the second.
        """
        trainable, total = 0, 0
        masked = {id(p.target.weight()) for p in self.parameters()}
        for parameter in self.model.parameters():
            counted = isinstance(parameter, CompactParameter) or id(parameter) not in masked
            if counted and parameter.requires_grad:
                trainable += parameter.numel()
            if not isinstance(parameter, CompactParameter):
                total += parameter.numel()
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print how many weights train, in PEFT's words.

        Example:
            >>> import torch, fishfast as ff
            >>> model = torch.nn.Linear(8, 2)
            >>> tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
            >>> tuned.print_trainable_parameters()
            trainable params: 3 || all params: 18 || trainable%: 16.6667
        """
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Make any torch optimizer write the trained values into the weights after each step.

        Its state dict gets the fp32 masters of bf16 and fp16 weights, so that it resumes exactly.
        A copied or unpickled torch optimizer has lost its hooks: attach it again.
        `fishfast.AdamW` and `fishfast.SGD` do so themselves, in the same launch as the update.

        Args:
            optimizer: an optimizer over `parameters`, or over some of them.

        Returns:
            A handle whose ``remove()`` undoes this.

        Raises:
            TypeError: not a torch optimizer, or LBFGS, which evaluates the model within a step.
            ValueError: the optimizer holds none of the compact parameters.

        Example:
            >>> import torch, fishfast as ff
            >>> model = torch.nn.Linear(4, 4)
            >>> tuned = ff.train_only(model, ff.random_mask(model, density=0.5, seed=0))
            >>> optimizer = torch.optim.RMSprop(tuned.parameters())
            >>> handle = tuned.attach(optimizer)
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer; got {type(optimizer).__name__}")
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                "optimizer must update once per step; got LBFGS, which evaluates the model several "
                "times before its values reach the weights"
            )
        own = {id(parameter) for parameter in self.parameters()}

        def held() -> list[CompactParameter]:
            return [p for p in parameters_in_order(optimizer) if id(p) in own]  # type: ignore[misc]

        if not held():
            raise ValueError(
                "optimizer must hold compact parameters of this model; got none of them; make it "
                "with tuned.parameters()"
            )

        def follow(*_: object) -> None:
            for parameter in held():
                parameter.follow_()

        def write_back(*_: object) -> None:
            for parameter in held():
                parameter.target.scatter_(parameter)

        take_masters(optimizer)  # of a state that was loaded before
        return Attachment(
            optimizer.register_step_pre_hook(follow),
            optimizer.register_step_post_hook(write_back),
            optimizer.register_state_dict_post_hook(add_masters),
            optimizer.register_load_state_dict_post_hook(take_masters),
        )

    def rebase(self) -> None:
        """Take the model's present state as the base that deltas name.

        Call it after loading another base checkpoint into a tuned model, before training goes on.
        """
        self.base = BaseIdentity.of(self.model, self.mask)

    def release(self) -> nn.Module:
        """Give the plain module back: trained weights in place, requires_grad as it was."""
        untap(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))
        return self.model
