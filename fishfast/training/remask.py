"""Another mask in the middle of training: what stays keeps its masters and moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.base_identity import BaseIdentity
from fishfast.training.gradient.tapped_module import CompactParameter, tap, untap
from fishfast.training.optimizer_state import MASTER, parameters_in_order
from fishfast.training.state import TuningState
from fishfast.training.targets import find_targets, refuse_later_ties, selected_values
from fishfast.training.values.sync import follow, refuse_unwritten
from fishfast.training.values.target import Target

__all__ = ["remask"]


def remask(
    tuned: TuningState,
    mask: SparseMask,
    on_leave: str,
    optimizer: Optimizer | None,
    param_group: Callable[[str], int] | None,
) -> None:
    """Do what `SparseTuning.remask` says: first all that may be refused, then all changes.

    Args:
        tuned: the handle, changed in place.
        mask: the new mask.
        on_leave: ``"keep"`` or ``"restore"``.
        optimizer: goes on with the new parameters.
        param_group: weight name -> index of the param group for new tensors.

    Raises:
        TypeError: see there.
        ValueError: see there.
        RuntimeError: see there.
    """
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask must be a SparseMask; got {type(mask).__name__}; see top_k_mask")
    if on_leave not in ("keep", "restore"):
        raise ValueError(f"on_leave must be 'keep' or 'restore'; got {on_leave!r}")
    if mask.num_selected == 0:
        raise ValueError("mask must select at least one weight; got an empty mask")
    model, olds = tuned.model, list(tuned.parameters())
    if not olds:
        raise RuntimeError("the model has no mask now; leave the released() block first")
    refuse_later_ties(model)
    mask.check_fits(model)
    targets = find_targets(model, mask)
    for target in targets:
        target.dense_gradient_limit = tuned.dense_gradient_limit
    _refuse_unwritten(tuned)

    union = _union(tuned.trained_mask, mask)
    base, base_values = tuned.base, tuned.base_values
    if union != tuned.trained_mask or on_leave == "restore":
        # Or a weight that changed unnoticed would be taken for the base's, or get another base's.
        tuned.identify()
    if union != tuned.trained_mask:
        base = replace(BaseIdentity.of(model, union), buffers=base.buffers)
        base_values = _base_values(tuned, union)
    moves = _moves(model, olds, targets)
    handover = None if optimizer is None else _Handover(optimizer, olds, moves, param_group)

    for old in olds:
        follow(old)
    for move in moves:
        move.carry_masters()
    _retap(model, olds, moves)
    if on_leave == "restore":
        _restore(tuned, mask)
    for old in olds:
        old.target.retired, old.grad = True, None
    for target in targets:
        target.weight().requires_grad_(False)
        target.mark_seen(target.weight(), with_bits=True)
    if handover is not None:
        handover.carry_out(model)
    tuned.mask, tuned.trained_mask = mask, union
    tuned.base, tuned.base_values = base, base_values


@dataclass
class _Move:
    """One tensor's way from the old mask to the new one.

    Attributes:
        name: the weight's.
        old: its compact parameter so far; None for a tensor without trained weights.
        new: the one that follows.
        stays: bool [k], which of the new entries the old mask had.
        source: int64, their positions in ``old``.
    """

    name: str
    old: CompactParameter | None
    new: CompactParameter
    stays: Tensor
    source: Tensor

    def carry(self, values: Tensor, into: Tensor) -> Tensor:
        """Put the values of the entries that stay into a tensor over the new ones."""
        into[self.stays] = values.detach()[self.source].to(into.dtype)
        return into

    def carry_masters(self) -> None:
        if self.old is not None:
            self.carry(self.old, self.new.detach())


def _moves(model: nn.Module, olds: list[CompactParameter], targets: list[Target]) -> list[_Move]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_weight = {id(old.target.weight()): old for old in olds}
    moves = []
    for target in targets:
        old = by_weight.get(id(target.weight()))
        before = target.indices[:0] if old is None else old.target.indices
        stays, source = _positions(target.indices, before)
        trains = True if old is None else old.requires_grad
        new = CompactParameter(target.gather().float(), target, trains)
        moves.append(_Move(names[id(target.weight())], old, new, stays, source))
    return moves


def _positions(indices: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return which indices are among others, and where; both ascend."""
    if len(among) == 0:
        return torch.zeros_like(indices, dtype=torch.bool), indices[:0].long()
    where = torch.searchsorted(among, indices).clamp_(max=len(among) - 1)
    stays = among[where] == indices
    return stays, where[stays]


def _retap(model: nn.Module, olds: list[CompactParameter], moves: list[_Move]) -> None:
    untap(model)
    try:
        for move in moves:
            tap(move.new.target, move.new)
    except BaseException:  # such as from a class that cannot be derived from
        untap(model)
        for old in olds:
            tap(old.target, old)
        raise


def _restore(tuned: TuningState, mask: SparseMask) -> None:
    """Give weights that leave their base values."""
    parameters = dict(tuned.model.named_parameters())
    for name, before in tuned.mask.items():
        if len(before) == 0:
            continue
        before = before.cpu()
        after = mask[name].cpu() if name in mask else before[:0]
        leaving = before[~_positions(before, after)[0]]
        _, where = _positions(leaving, tuned.trained_mask[name].cpu())
        module, _, own_name = name.rpartition(".")
        owner = (tuned.model.get_submodule(module), own_name)
        device = parameters[name].device
        target = Target([owner], leaving.to(device), name)
        target.scatter_(tuned.base_values[name][where].to(device))


def _union(a: SparseMask, b: SparseMask) -> SparseMask:
    """Return the mask of everything that either selects."""
    indices = {name: found.cpu() for name, found in a.items()}
    for name, found in b.items():
        both = torch.cat([indices.get(name, found[:0].cpu()), found.cpu()])
        indices[name] = torch.unique(both, sorted=True)
    return SparseMask(indices, {**a.shapes, **b.shapes})


def _base_values(tuned: TuningState, union: SparseMask) -> dict[str, Tensor]:
    """Extend the base values to a larger union, whose other weights have not been trained yet."""
    values = selected_values(tuned.model, union)
    for name, known in tuned.base_values.items():
        where = torch.searchsorted(union[name], tuned.trained_mask[name].cpu())
        values[name][where] = known.to(values[name].dtype)
    return values


def _refuse_unwritten(tuned: TuningState) -> None:
    for name, parameter in tuned.named_parameters():
        follow(parameter)
        refuse_unwritten(parameter, name)


class _Handover:
    """New parameters in an optimizer's groups in place of the old, with their state.

    Raises:
        TypeError: no torch optimizer.
        ValueError: an optimizer that cannot go on. It is not changed before `carry_out`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        olds: list[CompactParameter],
        moves: list[_Move],
        param_group: Callable[[str], int] | None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer; got {type(optimizer).__name__}")
        old_ids = {id(old) for old in olds}
        held = {id(p) for p in parameters_in_order(optimizer) if id(p) in old_ids}
        if not held:
            raise ValueError(
                "optimizer must hold compact parameters of this model; got none of them; make it "
                "with tuned.parameters()"
            )
        self.optimizer, self.olds = optimizer, olds
        self.moves = [move for move in moves if move.old is None or id(move.old) in held]
        for move in self.moves:
            if move.old is not None:
                _refuse_other_state(move.name, move.old, optimizer.state.get(move.old, {}))
        homes = [
            index
            for index, group in enumerate(optimizer.param_groups)
            if any(id(p) in held for p in group["params"])
        ]
        self.group_of = {
            id(move.new): _home(move.name, homes, len(optimizer.param_groups), param_group)
            for move in self.moves
            if move.old is None
        }

    def carry_out(self, model: nn.Module) -> None:
        """Change the optimizer."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        successors = {id(move.old): move.new for move in self.moves if move.old is not None}
        gone = {id(old) for old in self.olds}
        order = {id(p): position for position, p in enumerate(model.parameters())}
        names = {id(p): name for name, p in model.named_parameters()}
        for index, group in enumerate(groups):
            follow = [successors.get(id(p), p) for p in group["params"]]
            if "param_names" in group:  # of named parameters: who follows keeps what it was called
                names |= zip(map(id, follow), group["param_names"], strict=True)
            follow = [p for p in follow if id(p) not in gone]
            follow += [m.new for m in self.moves if self.group_of.get(id(m.new)) == index]
            # As a new optimizer over tuned.parameters() has them: states load by position.
            group["params"] = sorted(follow, key=lambda p: order.get(id(p), len(order)))
            if "param_names" in group:
                group["param_names"] = [names[id(p)] for p in group["params"]]
        for move in self.moves:
            before = state.get(move.old, {}) if move.old is not None else {}
            if before and bool(move.stays.any()):
                state[move.new] = {
                    key: move.carry(value, value.new_zeros(len(move.new)))
                    if isinstance(value, Tensor) and value.dim()
                    else value
                    for key, value in before.items()
                    if key != MASTER  # the new parameter is
                }
        for old in self.olds:
            state.pop(old, None)


def _home(
    name: str, homes: list[int], num_groups: int, param_group: Callable[[str], int] | None
) -> int:
    """Return the param group of a tensor that had no trained weight before."""
    if param_group is None:
        if len(homes) > 1:
            raise ValueError(
                f"param_group must say which param group {name!r} joins, since groups {homes} hold "
                "compact parameters; pass a function from the weight's name to the group's index"
            )
        return homes[0]
    index = param_group(name)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_groups:
        raise ValueError(
            f"param_group must return an index below {num_groups}; got {index!r} for {name!r}"
        )
    return index


def _refuse_other_state(name: str, old: CompactParameter, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != old.shape:
            raise ValueError(
                f"optimizer must keep one number per trained weight; its {key!r} of {name!r} has "
                f"shape {tuple(value.shape)} for {len(old)} weights; make a new optimizer from "
                "tuned.parameters() after remask"
            )
