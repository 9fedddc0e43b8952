"""`train_only`: freeze a model but for the weights of a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fishfast.base_identity import BaseIdentity
from fishfast.compact import (
    VALUES_SUFFIX,
    CompactParameter,
    Target,
    compact_parameters,
    tap,
    untap,
)
from fishfast.mask import SparseMask
from fishfast.masters import add_masters, parameters_in_order, take_masters

__all__ = ["Attachment", "SparseTuning", "train_only"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        if isinstance(optimizer, torch.optim.LBFGS):
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


def train_only(model: nn.Module, mask: SparseMask) -> SparseTuning:
    """Freeze a model but for the weights of a mask, which become compact fp32 parameters.

    Every weight gets ``requires_grad=False``; next to each masked one its k values are registered
    as an fp32 parameter, ``<name>_values``. So ``model.parameters()`` has what is trained, and
    gradient clipping, loss scaling, schedulers, DistributedDataParallel and torch optimizers work
    as they are. ``model.state_dict()`` keeps the base model's keys; the values live in the weights,
    and as fp32 masters in the compact parameters and the optimizer's state. Weights outside the
    mask stay bit-identical.

    Args:
        model: changed in place; fp32, bf16 or fp16 weights.
        mask: which weights to train.

    Returns:
        The handle: ``tuned.parameters()`` for the optimizer, ``attach``, ``release``.

    Raises:
        TypeError: ``mask`` is not a `SparseMask`, or ``model`` no module, or a scripted one.
        ValueError: a mask that selects nothing or does not fit the model, a weight whose dtype or
            memory cannot be trained so. The model is left as it was.
        RuntimeError: the model has a mask already.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(8, 2)
        >>> tuned = ff.train_only(model, ff.random_mask(model, density=0.25, seed=0))
        >>> optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
        >>> model(torch.randn(3, 8)).square().sum().backward()
        >>> optimizer.step()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model must not hold torch.jit modules; train before scripting it")
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask must be a SparseMask; got {type(mask).__name__}; see top_k_mask")
    if next(compact_parameters(model), None) is not None:
        raise RuntimeError("model has a mask already; call release() on its handle first")
    if mask.num_selected == 0:
        raise ValueError("mask must select at least one weight; got an empty mask")
    mask.check_fits(model)
    targets = _targets(model, mask)
    base = BaseIdentity.of(model, mask)

    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    frozen = list(model.parameters())
    try:
        for target in targets:
            tap(target)
    except BaseException:  # such as from a class that cannot be derived from
        untap(model)
        raise
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None  # a frozen weight's gradient would only hold memory
    return SparseTuning(model, mask, base, trainable)


def _targets(model: nn.Module, mask: SparseMask) -> list[Target]:
    """Find the owners of every masked weight and check that it can be trained; change nothing."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, own_name))
    parameters = dict(model.named_parameters())
    targets = []
    for name, indices in mask.items():
        if len(indices) == 0:
            continue
        weight = parameters[name]
        _check_weight(name, weight)
        for module, own_name in owners[id(weight)]:
            if hasattr(module, own_name + VALUES_SUFFIX):
                raise ValueError(
                    f"model must not have an attribute {own_name + VALUES_SUFFIX!r} beside {name!r}"
                )
        targets.append(Target(owners[id(weight)], indices.to(weight.device)))
    return targets


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"masked weights must be float32, bfloat16 or float16; got {weight.dtype} for "
            f"{name!r}; masters are fp32 and could not hold it"
        )
    if weight.is_inference():
        raise ValueError(
            f"masked weights must not be made in inference mode; {name!r} was; clone the model"
        )
    if weight.device.type == "meta":
        raise ValueError(f"masked weights must have memory; {name!r} is on the meta device")
    strides = sorted(
        (stride, n) for stride, n in zip(weight.stride(), weight.shape, strict=True) if n > 1
    )
    for (stride, n), (larger, _) in zip(strides, strides[1:], strict=False):
        if stride * n > larger:
            raise ValueError(f"masked weights must not overlap in memory; {name!r} does")
    if strides and strides[0][0] == 0:
        raise ValueError(f"masked weights must not be expanded; {name!r} has stride 0")
