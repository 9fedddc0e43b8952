"""Deltas: the trained weights of a mask as a small file, to be put on the base and taken off."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishfast._files import PathLike, read_checked, refuse_damaged, write_atomically
from fishfast.base_identity import BaseIdentity
from fishfast.compact import Target, compact_parameters
from fishfast.mask import SparseMask, shapes_from_json
from fishfast.tuning import SparseTuning

__all__ = ["Delta", "load_delta", "refuse_non_finite", "save_delta"]

_FORMAT, _VERSION = "fishfast.delta", 2
_INDICES, _VALUES, _BUFFER = "indices/", "values/", "buffer/"


def save_delta(tuned: SparseTuning, path: PathLike) -> int:
    """Save the trained weights: k indices, k absolute values, and buffers that training changed.

    A safetensors file, written atomically: a kill at any moment leaves the old file or the new
    one. It names its base model by the hashes that `train_only` took. After `SparseTuning.remask`
    it holds the union of all masks so far.

    Args:
        tuned: the handle that `train_only` returned.
        path: target file; its folder must exist.

    Returns:
        The number of weights that the delta holds.

    Raises:
        TypeError: ``tuned`` is not such a handle.
        ValueError: a value that is not finite.
        RuntimeError: the model's names, shapes, dtypes or ties changed since `train_only`, or
            trained values were not written into the weights.

    Example:
        >>> import os, tempfile, torch, fishfast as ff
        >>> model = torch.nn.Linear(4, 4)
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ff.save_delta(tuned, os.path.join(folder, "task.safetensors"))
        ...     ff.load_delta(os.path.join(folder, "task.safetensors")).num_selected
        3
        3
    """
    if not isinstance(tuned, SparseTuning):
        raise TypeError(f"tuned must be what train_only returned; got {type(tuned).__name__}")
    model, mask = tuned.model, tuned.trained_mask
    now = tuned.identify()
    for name, parameter in compact_parameters(model):
        weights = parameter.target.gather()
        refuse_non_finite(name, parameter, "the trained model")  # NaN would not equal itself
        if not torch.equal(parameter.detach().to(weights.dtype), weights):
            raise RuntimeError(
                f"the values of {name!r} were not written into the weights; call "
                "tuned.attach(optimizer) for an optimizer that is not fishfast's"
            )
    values = {name: target.gather() for name, target in _targets(model, mask).items()}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    changed = [name for name, digest in now.buffers.items() if digest != tuned.base.buffers[name]]
    for name, tensor in {**values, **{name: buffers[name] for name in changed}}.items():
        refuse_non_finite(name, tensor, "the trained model")
    others = sorted({*tuned.base.weights, *tuned.base.buffers} - {*mask, *(tuned.base.ties or {})})
    Delta(
        mask, values, {name: buffers[name].clone() for name in changed},  # buffers may overlap
        tuned.base.structure, tuned.base.content(changed), tuned.base.ties, others,
    ).save(path)  # fmt: skip
    return mask.num_selected


def load_delta(path: PathLike) -> Delta:
    """Read a delta that `save_delta` wrote; it is put on a model with ``apply_``.

    Args:
        path: the file.

    Returns:
        The delta, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a delta, a newer version, names that occur twice, indices that are out of
            range, unsorted or repeated, values that are missing, of another length or not finite.
    """
    tensors, metadata = read_checked(path, _FORMAT, _VERSION)
    source = repr(os.fspath(path))
    parts: dict[str, dict[str, Tensor]] = {_INDICES: {}, _VALUES: {}, _BUFFER: {}}
    for key, tensor in tensors.items():
        kind = next((kind for kind in parts if key.startswith(kind)), None)
        if kind is None:
            raise ValueError(f"{source} holds {key!r}, which is no part of a delta")
        parts[kind][key[len(kind) :]] = tensor
    indices, values = parts[_INDICES], parts[_VALUES]
    try:
        shapes = shapes_from_json(metadata["shapes"])
        fingerprint = metadata["mask_fingerprint"]
        structure, content = metadata["base_structure"], metadata["base_content"]
        ties, others = json.loads(metadata["base_ties"]), json.loads(metadata["base_others"])
        _check_base_names(ties, others)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} has a broken header: {error!r}") from error
    if unmatched := set(indices) ^ set(values):
        raise ValueError(f"{source} must hold indices and values of the same parameters; got only "
                         f"one of them for {sorted(unmatched)[0]!r}")  # fmt: skip
    for name, found in indices.items():
        if not values[name].is_floating_point():
            raise ValueError(
                f"{source}: values must be floating; {name!r} has {values[name].dtype}"
            )
        if values[name].dim() != 1 or len(values[name]) != found.numel():
            raise ValueError(
                f"{source} holds {found.numel()} indices and {values[name].numel()} values of "
                f"{name!r}"
            )
    for name, tensor in {**values, **parts[_BUFFER]}.items():
        refuse_non_finite(name, tensor, source)
    try:
        mask = SparseMask(indices, shapes)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if mask.fingerprint != fingerprint:
        raise ValueError(f"{source} does not match its fingerprint: the file is damaged")
    refuse_damaged(path, tensors, metadata)
    return Delta(mask, values, parts[_BUFFER], structure, content, ties, others)


class Delta:
    """Trained weights of one task, apart from the base model.

    Args:
        mask: which weights.
        values: name -> their absolute values, in the order of the mask's indices.
        buffers: name -> buffers that training changed.
        base_structure: hash of the base's names, shapes and dtypes.
        base_content: hash of the base's values that the delta does not replace.
        base_ties: further name of a tied weight of the base -> its first name; None where that is
            not known, as it is of a checkpoint.
        base_others: names of the base's tensors that the mask does not have.
    """

    def __init__(
        self,
        mask: SparseMask,
        values: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        base_structure: str,
        base_content: str,
        base_ties: Mapping[str, str] | None = None,
        base_others: Iterable[str] = (),
    ) -> None:
        self.mask, self.values, self.buffers = mask, dict(values), dict(buffers)
        self.base_structure, self.base_content = base_structure, base_content
        self.base_ties = None if base_ties is None else dict(base_ties)
        self.base_others = tuple(base_others)
        # What apply_ overwrote, model by model.
        self._overwritten: weakref.WeakKeyDictionary[
            nn.Module, tuple[dict[str, Tensor], dict[str, Tensor]]
        ] = weakref.WeakKeyDictionary()

    @property
    def num_selected(self) -> int:
        """Number of weights that the delta sets."""
        return self.mask.num_selected

    def __repr__(self) -> str:
        return (
            f"Delta({self.num_selected:,} of {self.mask.num_params:,} weights, "
            f"{len(self.buffers)} buffers, base {self.base_content[:8]})"
        )

    def save(self, path: PathLike) -> None:
        """Write a file for `load_delta`, atomically.

        Args:
            path: target file; its folder must exist.
        """
        tensors = {_BUFFER + name: buffer for name, buffer in self.buffers.items()}
        for name, values in self.values.items():
            tensors[_INDICES + name], tensors[_VALUES + name] = self.mask[name], values
        metadata = {
            "format": _FORMAT,
            "format_version": str(_VERSION),
            "shapes": json.dumps(self.mask.shapes),
            "mask_fingerprint": self.mask.fingerprint,
            "base_structure": self.base_structure,
            "base_content": self.base_content,
            "base_ties": json.dumps(self.base_ties),
            "base_others": json.dumps(self.base_others),
        }
        write_atomically(path, tensors, metadata)

    def apply_(self, model: nn.Module, *, check_base: bool = True) -> nn.Module:
        """Put the trained weights and buffers on the base model; keep what they overwrite.

        Args:
            model: the base model, changed in place, bit-exactly.
            check_base: hash the model and refuse any but the base (about 1 GB/s a core). Without
                it, only that the delta's own names, shapes and dtypes are there.

        Returns:
            The model.

        Raises:
            ValueError: another base model, or one that the delta does not fit. Nothing was changed.
            RuntimeError: the delta is on this model already.
        """
        if model in self._overwritten:
            raise RuntimeError("this delta is on the model already; call revert_ first")
        targets, buffers = self._places(model)
        if check_base:
            self.refuse_other_base(BaseIdentity.of(model, self.mask))
        values = {name: self.values[name].to(t.indices.device) for name, t in targets.items()}
        states = {name: self.buffers[name].to(buffer.device) for name, buffer in buffers.items()}
        self._overwritten[model] = (
            {name: target.gather() for name, target in targets.items()},
            {name: buffer.clone() for name, buffer in buffers.items()},
        )
        _write(model, targets, values, buffers, states)
        return model

    def revert_(self, model: nn.Module) -> nn.Module:
        """Put back, bit for bit, what ``apply_`` overwrote on this model.

        Args:
            model: a model that this delta object was put on, with nothing put on top since.

        Returns:
            The model.

        Raises:
            RuntimeError: the delta is not on this model, or its weights were changed since.
                Nothing was changed.
        """
        if model not in self._overwritten:
            raise RuntimeError("this delta is not on the model: apply_ was not called on it")
        targets, buffers = self._places(model)
        for name, target in targets.items():
            _refuse_changed(name, target.gather(), self.values[name])
        for name, buffer in buffers.items():
            _refuse_changed(name, buffer, self.buffers[name])
        old_values, old_buffers = self._overwritten.pop(model)
        _write(model, targets, old_values, buffers, old_buffers)
        return model

    def refuse_other_base(self, found: BaseIdentity) -> None:
        """Refuse a model that is not the base of this delta.

        Args:
            found: its hashes, taken with this delta's mask.

        Raises:
            ValueError: names, shapes, dtypes, ties, weights or buffers differ.
        """
        self.refuse_other_structure(found.structure, found.ties)
        self.refuse_other_content(found)

    def refuse_other_structure(self, structure: str, ties: Mapping[str, str] | None = None) -> None:
        """Refuse a model of other names, shapes or dtypes.

        Args:
            structure: the hash of the model's.
            ties: its ties, where they are known.

        Raises:
            ValueError: they differ from the base's.
        """
        what = "names, shapes, dtypes or ties"
        _refuse_other(what, self.base_structure, structure)
        if self.base_ties is not None and ties is not None:
            _refuse_other(what, str(sorted(self.base_ties.items())), str(sorted(ties.items())))

    def refuse_other_content(self, found: BaseIdentity) -> None:
        """Refuse a model of other weights or buffers.

        Args:
            found: its hashes, taken with this delta's mask.

        Raises:
            ValueError: what the delta does not replace differs from the base's.
        """
        _refuse_other("weights or buffers", self.base_content, found.content(self.buffers))

    def _places(self, model: nn.Module) -> tuple[dict[str, Target], dict[str, Tensor]]:
        """Where everything goes; refuses a model that it does not fit."""
        # What is not changed need not be a parameter: a checkpoint does not say what is one.
        self.mask.check_fits(model, selected_only=True)
        targets = _targets(model, self.mask)
        for name, target in targets.items():
            if target.weight().dtype != self.values[name].dtype:
                raise ValueError(
                    f"the delta must fit the model; {name!r} is {self.values[name].dtype} in the "
                    f"delta and {target.weight().dtype} in the model"
                )
        present = dict(model.named_buffers(remove_duplicate=False))
        for name, saved in self.buffers.items():
            buffer = present.get(name)
            if buffer is None or buffer.shape != saved.shape or buffer.dtype != saved.dtype:
                raise ValueError(
                    f"the delta must fit the model; it sets the buffer {name!r}, which the model "
                    "does not have in this shape and dtype"
                )
        return targets, {name: present[name] for name in self.buffers}


def _targets(model: nn.Module, mask: SparseMask) -> dict[str, Target]:
    """The place of every parameter that has selected weights."""
    parameters = dict(model.named_parameters())
    targets = {}
    for name, found in mask.items():
        if len(found):
            module_name, _, own_name = name.rpartition(".")
            owner = (model.get_submodule(module_name), own_name)
            targets[name] = Target([owner], found.to(parameters[name].device))
    return targets


def _write(
    model: nn.Module,
    targets: Mapping[str, Target],
    values: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            target.scatter_(values[name].to(target.weight().device))
        for name, buffer in buffers.items():
            buffer.copy_(states[name])
    for _, parameter in compact_parameters(model):
        parameter.refresh_()  # a model in training goes on from the new weights


def _refuse_other(what: str, expected: str, got: str) -> None:
    if expected != got:
        raise ValueError(
            f"the delta was trained from another base model: its {what} differ (base "
            f"{expected[:12]}, this model {got[:12]}); load the base that it was trained "
            "from, revert what was put on it, or pass check_base=False"
        )


def _check_base_names(ties: Any, others: Any) -> None:
    """Raise TypeError where a file's header has something else; it may say anything."""
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        raise TypeError("base_others are no names")
    if ties is not None and not all(isinstance(name, str) for name in ties.values()):
        raise TypeError("base_ties are no names")


def _refuse_changed(name: str, now: Tensor, applied: Tensor) -> None:
    if not torch.equal(now.cpu(), applied.cpu()):
        raise RuntimeError(
            f"the delta is not on top: {name!r} was changed after apply_ (another delta, or "
            "training); undo that first"
        )


def refuse_non_finite(name: str, tensor: Tensor, source: str) -> None:
    """Refuse values that a delta cannot hold.

    Args:
        name: the weight's or buffer's.
        tensor: its values.
        source: where they are, for the message.

    Raises:
        ValueError: a NaN or infinity.
    """
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # torch has no isfinite for 8-bit floats
        tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"values must be finite; {name!r} in {source} has NaN or infinity")
