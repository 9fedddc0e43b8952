"""Where the k values of a compact parameter live in a weight: read, written, watched.

It knows the modules that hold the weight, the indices and the memory layout, but no masters and no
optimizer.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["DENSE_GRADIENT_LIMIT", "Target"]

DENSE_GRADIENT_LIMIT = 64 * 2**20


class Target:
    """Where the values of a compact parameter live.

    Args:
        owners: every (module, parameter name) that holds the weight; several when it is tied.
        indices: ascending flat indices of the selected weights, row-major.
        name: the weight's in the model, for errors.

    Attributes:
        plan: how calls of the owners compute the gradient, put there by
            `fishfast.training.gradient.layers`; None if none of them does.
        values: the compact parameter, from the moment that its owners hold it.
        tap: the weight's kept gradient tap, put there by
            `fishfast.training.gradient.weight_tap`; no copy has it.
        shares_input: whether another layer takes the same input; None: not known yet.
        columns: which columns of the input are kept, put there by
            `fishfast.training.gradient.kept_input`.
        dense_gradient_limit: bytes of a dense gradient that may live for a moment.
        retired: another mask replaced the values: whoever still trains them is told so.
        lent: the model is plain for now, in a ``with tuned.released()`` block.
        disabled: the weight has the base's values for now, in a ``with tuned.disabled()`` block.
    """

    plan: Any = None
    values: Any = None
    tap: Any = None
    _seen: _Seen | None = None  # also of one whose attributes are not unpickled yet
    shares_input: bool | None = None
    columns: Any = None
    dense_gradient_limit = DENSE_GRADIENT_LIMIT
    retired = lent = disabled = False

    def __init__(self, owners: list[tuple[nn.Module, str]], indices: Tensor, name: str) -> None:
        self.owners, self.name = owners, name
        # The compiled step reads them by address, so they are nobody else's to change.
        self.indices = indices.clone(memory_format=torch.contiguous_format)
        module, own_name = owners[0]
        self.shape = module._parameters[own_name].shape  # type: ignore[union-attr]
        self._fingerprint: int | None = None
        self._offsets: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def fingerprint(self) -> int:
        """A number of 60 bits made from the indices and the weight's shape, to tell masks apart."""
        if self._fingerprint is None:
            found = hashlib.blake2b(repr(tuple(self.shape)).encode(), digest_size=8)
            found.update(self.indices.long().cpu().numpy().tobytes())
            self._fingerprint = int.from_bytes(found.digest(), "little") >> 4
        return self._fingerprint

    def weight(self) -> Tensor:
        """Return the weight as the module holds it now.

        Raises:
            RuntimeError: a weight that is gone, has another shape now, or is tied and its owners
                hold different tensors now, or values that another mask replaced.
        """
        if self.retired:
            raise RuntimeError(
                f"parameters must be those of the model's present mask; got those of {self.name!r} "
                "from before tuned.remask; pass remask optimizer=, or make a new optimizer from "
                "tuned.parameters()"
            )
        module, name = self.owners[0]
        weight = module._parameters.get(name)  # a parametrization or pruning takes it away
        if weight is None or weight.shape != self.shape:
            got = "gone" if weight is None else f"of shape {tuple(weight.shape)} now"
            raise RuntimeError(
                f"the masked weight {self.name!r} had shape {tuple(self.shape)} in train_only and "
                f"is {got}; release() before changing it"
            )
        if not self.is_whole():
            raise RuntimeError(
                f"the tied weight {self.name!r} was untied after train_only (load_state_dict with "
                "assign=True?); tie it again, for instance with model.tie_weights() in no_grad mode"
            )
        return weight

    def is_whole(self) -> bool:
        """Return whether every owner of the weight holds the same tensor."""
        if len(self.owners) == 1:  # nearly always, and asked in every step
            return True
        return len({id(module._parameters.get(name)) for module, name in self.owners}) == 1

    def offsets(self, weight: Tensor) -> Tensor:
        """Return where the selected weights lie in the weight's storage: indices, if contiguous."""
        if weight.is_contiguous():
            return self.indices
        if self._offsets is None or self._offsets[0] != weight.stride():
            coordinates = torch.unravel_index(self.indices.long(), weight.shape)
            offsets = sum(
                c * stride for c, stride in zip(coordinates, weight.stride(), strict=True)
            )
            self._offsets = (weight.stride(), torch.as_tensor(offsets))
        return self._offsets[1].to(weight.device)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what was seen: a copied tensor counts its versions anew."""
        return {name: held for name, held in self.__dict__.items() if name not in ("_seen", "tap")}

    @property
    def has_seen(self) -> bool:
        """Whether `mark_seen` was called here; not yet on a copy."""
        return self._seen is not None

    def mark_seen(self, weight: Tensor, with_bits: bool = False) -> None:
        """Remember the weight as it is: the masters agree with it.

        Args:
            weight: the weight.
            with_bits: remember its masked entries' bits, too, for `has_bits`; reads them.
        """
        if self._seen is None or not self._seen.is_same(weight):
            self._seen = _Seen(weight)
        self._seen.version = weight._version
        if with_bits:
            self._seen.bits = (weight._version, self._digest())

    def mark_written(self, weight: Tensor) -> None:
        """Remember what was written into the weight that was seen."""
        assert self._seen is not None
        self._seen.version = weight._version

    def has_bits(self) -> bool:
        """Return whether the masked entries have the bits of the last `mark_seen` with them.

        False where something was written since by whoever marked it seen.
        """
        seen = self._seen
        if seen is None or seen.bits is None or seen.bits[0] != seen.version:
            return False
        return self.is_present() and self._digest() == seen.bits[1]

    def _digest(self) -> bytes:
        entries = self.gather().cpu()
        return hashlib.blake2b(entries.view(torch.uint8).numpy().tobytes()).digest()

    def changed(self, weight: Tensor) -> bool:
        """Return whether the weight was replaced or written to since `mark_seen`.

        Writes past autograd, such as ``weight.data.zero_()``, leave no trace.
        """
        seen = self._seen
        return seen is None or seen.version != weight._version or not seen.is_same(weight)

    def agrees(self) -> bool:
        """Return whether the weight is there and was not changed; raises nothing."""
        module, name = self.owners[0]
        weight = module._parameters.get(name)
        return weight is not None and not self.changed(weight)

    def is_present(self) -> bool:
        """Return whether the weight is there, in the shape that the indices are for."""
        module, name = self.owners[0]
        weight = module._parameters.get(name)
        return weight is not None and weight.shape == self.shape and self.is_whole()

    @staticmethod
    def extent(weight: Tensor) -> int:
        """Return how many elements of its storage a weight reaches over."""
        return 1 + sum(
            (n - 1) * stride for n, stride in zip(weight.shape, weight.stride(), strict=True)
        )

    def gather(self) -> Tensor:
        """Return the selected weights, in the weight's dtype."""
        return self.weight().detach().flatten().index_select(0, self.indices)

    def scatter_(self, values: Tensor) -> None:
        """Write values, rounded to the weight's dtype, into the weight and nothing else."""
        weight = self.weight()
        storage = weight.detach().as_strided((self.extent(weight),), (1,))
        storage.index_copy_(0, self.offsets(weight).long(), values.detach().to(weight.dtype))
        self.mark_seen(weight)


class _Seen:
    """A weight as it was seen.

    ``weight.data = other`` counts no version and may give the new tensor the old one's address. Its
    storage is another, and the weak reference keeps a storage's own address from being used again.
    """

    __slots__ = ("_offset", "_storage", "_stride", "_weight", "bits", "version")

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._offset = weight, weight.storage_offset()
        self._stride = weight.stride()  # the transpose of a square one has all else
        self._storage = StorageWeakRef(weight.untyped_storage())
        self.version = weight._version
        self.bits: tuple[int, bytes] | None = None  # at which version the masked entries were so

    def is_same(self, weight: Tensor) -> bool:
        """Return whether this is that tensor in that memory, whatever was written there."""
        return (
            self._weight is weight
            and self._storage.cdata == weight.untyped_storage()._cdata
            and self._offset == weight.storage_offset()
            and self._stride == weight.stride()
        )
