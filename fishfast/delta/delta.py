"""Deltas: the trained weights of a mask as a small file, to be put on the base and taken off.

Which base that is, and whether it is this model, is known here. `fishfast.delta.file` has the file,
`fishfast.delta.places` the weights and buffers in a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fishfast._wrappers import unwrapped
from fishfast.delta.file import Contents, read_delta, refuse_non_finite, write_delta
from fishfast.delta.places import Places
from fishfast.files.atomic import PathLike
from fishfast.mask.sparse_mask import SparseMask
from fishfast.training.base_identity import BaseIdentity
from fishfast.training.gradient.tapped_module import compact_parameters
from fishfast.training.handle import SparseTuning
from fishfast.training.targets import targets_of
from fishfast.training.values.sync import follow, refuse_unwritten

__all__ = ["Delta", "load_delta", "save_delta"]


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
            trained values were not written into the weights, because a write past autograd, such
            as through numpy, left no trace.

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
        follow(parameter)
        refuse_non_finite(name, parameter, "the trained model")  # NaN would not equal itself
        refuse_unwritten(parameter, name)
    values = {name: target.gather() for name, target in targets_of(model, mask).items()}
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
    return Delta(*read_delta(path))


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

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what was overwritten in models, which are of this process."""
        return {**self.__dict__, "_overwritten": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with no model overwritten."""
        self.__dict__.update(state)
        self._overwritten = weakref.WeakKeyDictionary()

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
        contents = Contents(
            self.mask, self.values, self.buffers,
            self.base_structure, self.base_content, self.base_ties, self.base_others,
        )  # fmt: skip
        write_delta(path, contents)

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
        given, model = model, unwrapped(model)
        if model in self._overwritten:
            raise RuntimeError("this delta is on the model already; call revert_ first")
        places = Places(model, self.mask, self.values, self.buffers)
        if check_base:
            self.refuse_other_base(BaseIdentity.of(model, self.mask))
        values, buffers = places.beside(self.values, self.buffers)
        self._overwritten[model] = places.read()
        places.write(values, buffers)
        return given

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
        given, model = model, unwrapped(model)
        if model not in self._overwritten:
            raise RuntimeError("this delta is not on the model: apply_ was not called on it")
        places = Places(model, self.mask, self.values, self.buffers)
        places.refuse_changed(self.values, self.buffers)
        places.write(*self._overwritten.pop(model))
        return given

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


def _refuse_other(what: str, expected: str, got: str) -> None:
    if expected != got:
        raise ValueError(
            f"the delta was trained from another base model: its {what} differ (base "
            f"{expected[:12]}, this model {got[:12]}); load the base that it was trained "
            "from, revert what was put on it, or go without the check (check_base=False, "
            "--no-check-base)"
        )
