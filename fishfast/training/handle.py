"""`SparseTuning`: the handle on a model that trains only the weights of a mask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.optim import Optimizer

from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.attach import Attachment, attach
from fishfast.training.base_identity import BaseIdentity
from fishfast.training.disabled import base_model
from fishfast.training.gradient.layers import way
from fishfast.training.gradient.tapped_module import (
    VALUES_SUFFIX,
    CompactParameter,
    tap,
    untap,
)
from fishfast.training.param_groups import make_param_groups
from fishfast.training.remask import remask
from fishfast.training.state import TuningState
from fishfast.training.targets import refuse_later_ties, selected_values
from fishfast.training.values.sync import follow, take_changes

__all__ = ["SparseTuning"]


class SparseTuning(TuningState):
    """The handle on a model that trains only its masked weights.

    Attributes:
        model: the model, changed in place; it runs the forward as before.
        mask: the present mask.
        trained_mask: the union of all masks so far: what a delta holds.
        base: the hashes of the model before training.
    """

    @property
    def num_selected(self) -> int:
        """Number of weights that train now, k."""
        return self.mask.num_selected

    def __repr__(self) -> str:
        return f"SparseTuning({type(self.model).__name__}, {self.mask!r})"

    def report(self) -> str:
        """Return a table: each trained weight, its dtype, and how its gradient is computed.

        "picked from the dense gradient": a dense gradient of this weight lives for a moment in
        backward, one at a time; never above ``dense_gradient_limit`` in linear and convolution
        layers. "sums over ..." and "products of ..." name what is computed instead, and from how
        many numbers in the layer's input on. A weight of several modules may have several ways.

        Raises:
            RuntimeError: a weight was tied or untied after `train_only`.
        """
        refuse_later_ties(self.model)
        rows = [
            (
                name.removesuffix(VALUES_SUFFIX), str(p.target.weight().dtype), f"{len(p):,}",
                way(p.target),
            )
            for name, p in self.named_parameters()
        ]  # fmt: skip
        table = tabulate(
            rows, headers=("parameter", "dtype", "trained", "gradient"), disable_numparse=True,
            colalign=("left", "left", "right", "left"),
        )  # fmt: skip
        if self.trained_mask == self.mask:
            return table
        return (
            f"{table}\n{self.num_selected:,} weights train now; a delta holds "
            f"{self.trained_mask.num_selected:,}, the union of all masks so far"
        )

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

    def param_groups(
        self,
        weight_decay: float = 0.0,
        *,
        no_decay: str | Iterable[str] = (),
        head_lr: float | None = None,
        head: str | Iterable[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return param groups by the weights' own shapes and names, for any optimizer.

        The usual rule, to decay what has two dimensions or more, finds nothing among compact
        parameters, which are vectors. Here it goes by the weights: matrices and kernels decay,
        biases and the scales of norms do not.

        Args:
            weight_decay: of the groups that decay.
            no_decay: paths or globs of further weights that do not, such as ``"*.embed*"``.
            head_lr: a learning rate for the head. Default: the optimizer's.
            head: paths or globs of the head. Default: weights that are masked whole, such as those
                of ``keep``.

        Returns:
            One to four groups; together they have every compact parameter once.

        Raises:
            ValueError: a negative number, a path that matches nothing, ``head`` without
                ``head_lr``, or ``head_lr`` without any head.

        Example:
            >>> import torch, fishfast as ff
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
            >>> mask = ff.random_mask(model, k=30, seed=0, keep="1")
            >>> tuned = ff.train_only(model, mask)
            >>> groups = tuned.param_groups(weight_decay=0.01, head_lr=1e-3)
            >>> [(len(g["params"]), g["weight_decay"], g.get("lr")) for g in groups]
            [(1, 0.01, None), (1, 0.0, None), (1, 0.01, 0.001), (1, 0.0, 0.001)]
            >>> optimizer = ff.AdamW(groups, lr=1e-4)
        """
        return make_param_groups(self.named_parameters(), weight_decay, no_decay, head_lr, head)

    def disabled(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Run the base model within ``with tuned.disabled():``, as PEFT's ``disable_adapter`` does.

        It is the reference of DPO, or of a KL term. The base's k values are written into the
        weights and the trained ones back, bit for bit, so a forward before the block may have its
        backward after it. Nothing trains within the block. Buffers stay as they are.

        Returns:
            A context manager that gives the model.

        Raises:
            RuntimeError: when it is entered within another such block, or while the model is
                released; when a backward of the trained model runs within it.

        Example:
            >>> import torch, fishfast as ff
            >>> model, x = torch.nn.Linear(4, 2), torch.ones(1, 4)
            >>> base = model(x).detach()
            >>> tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
            >>> optimizer = ff.SGD(tuned.parameters(), lr=1.0)
            >>> model(x).sum().backward()
            >>> optimizer.step()
            >>> with tuned.disabled(), torch.no_grad():
            ...     print(torch.equal(model(x), base))
            True
            >>> torch.equal(model(x), base)
            False
        """
        return base_model(self)

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Keep masters and mask in any torch optimizer's state dict, so that it resumes exactly.

        The weights follow its steps without this. Its state dict gets the fp32 masters of bf16 and
        fp16 weights, and a state of another mask is refused when it is loaded. A copied or
        unpickled torch optimizer has lost its hooks: attach it again. `fishfast.AdamW` and
        `fishfast.SGD` need none.

        Args:
            optimizer: an optimizer over `parameters`, or over some of them; or what wraps one under
                the attribute ``optimizer``, such as Accelerate's.

        Returns:
            A handle whose ``remove()`` undoes this.

        Raises:
            TypeError: not a torch optimizer.
            ValueError: the optimizer holds none of the compact parameters.

        Example:
            >>> import torch, fishfast as ff
            >>> model = torch.nn.Linear(4, 4)
            >>> tuned = ff.train_only(model, ff.random_mask(model, density=0.5, seed=0))
            >>> optimizer = torch.optim.RMSprop(tuned.parameters())
            >>> handle = tuned.attach(optimizer)
        """
        return attach(self, optimizer)

    def remask(
        self,
        mask: SparseMask,
        on_leave: str = "keep",
        *,
        optimizer: Optimizer | None = None,
        param_group: Callable[[str], int] | None = None,
    ) -> None:
        """Train another mask from here on.

        Weights in both masks keep their fp32 masters and, in the optimizer, their moments; new ones
        start from their present values with zero moments. The compact parameters are new objects
        and gradients are dropped, so call it between steps, and wrap the model in
        DistributedDataParallel again. An optimizer that was not passed refuses to step, be it
        fishfast's or an attached one.

        To resume such a run: the base, `train_only` and `remask` with the same masks in turn, then
        the model's state dict, then the optimizer's.

        Args:
            mask: the new mask, such as from new scores: ``with tuned.released() as model``.
            on_leave: what becomes of weights that leave: ``"keep"`` their trained values, or
                ``"restore"`` those of the base model.
            optimizer: goes on with the new parameters, in the order of ``model.parameters()``.
                Default: none; make a new one.
            param_group: weight name -> index of the param group for a tensor that had no trained
                weight; needed when several groups hold compact parameters.

        Raises:
            TypeError: no mask, or no torch optimizer.
            ValueError: a mask that selects nothing or does not fit, an unknown ``on_leave``, an
                optimizer without these parameters or with state of another shape than theirs,
                a param group that is needed or out of range. Nothing was changed.
            RuntimeError: the model is released, weights outside the masks changed, or trained
                values were not written into the weights. Nothing was changed.

        Note:
            ``"restore"`` costs a hash of the model (about 1 GB/s a core), so that no other base's
            values are put back; a mask with weights that no mask had before costs two, so that
            deltas still name the base.

        Example:
            >>> import torch, fishfast as ff
            >>> model = torch.nn.Linear(8, 2)
            >>> tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
            >>> optimizer = ff.AdamW(tuned.parameters())
            >>> with tuned.released() as plain:
            ...     mask = ff.random_mask(plain, k=3, seed=1)
            >>> tuned.remask(mask, on_leave="restore", optimizer=optimizer)
            >>> tuned.num_selected, tuned.trained_mask.num_selected
            (3, 6)
        """
        remask(self, mask, on_leave, optimizer, param_group)

    def rebase(self) -> None:
        """Take the model's present state as the base that deltas name.

        Weights that anything wrote are taken over, whether torch counted the write or not. Call it
        after loading another base checkpoint into a tuned model, or wrapping in
        DistributedDataParallel one whose weights were not those of rank 0; before training goes on.

        Raises:
            RuntimeError: a weight was tied or untied after `train_only`. Nothing was changed.
        """
        refuse_later_ties(self.model)
        for parameter in self.parameters():
            follow(parameter)
            take_changes(parameter)  # of a collective, which counts no version
        self.base = BaseIdentity.of(self.model, self.mask)
        self.trained_mask, self.base_values = self.mask, selected_values(self.model, self.mask)

    @contextlib.contextmanager
    def released(self) -> Iterator[nn.Module]:
        """Lend the plain module, such as to score it for `remask`; it is tuned again after.

        Yields:
            The model with its trained weights in place and requires_grad as before `train_only`.
        """
        held = list(self.parameters())
        flags = {
            name: p.requires_grad
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if not isinstance(p, CompactParameter)
        }
        try:
            for parameter in held:
                parameter.target.lent = True
            yield SparseTuning.release(self)  # not what a subclass adds
        finally:
            for parameter in held:
                parameter.target.lent = False
                tap(parameter.target, parameter)
            for name, weight in self.model.named_parameters(remove_duplicate=False):
                weight.requires_grad_(flags.get(name, weight.requires_grad))

    def release(self) -> nn.Module:
        """Give the plain module back: trained weights in place, requires_grad as it was.

        Returns:
            The model. Its optimizer refuses to step from here on, fishfast's or an attached one.
        """
        untap(self.model)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))
        return self.model
