"""Names a base model by hashes, so that a delta is never applied to another one.

The hashes are the same for a model in memory and for its checkpoint on disk, which knows no order
of its tensors, no buffers, and a tied weight under one name only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.files.tensor_writer import raw_bytes
from fishfast.mask.sparse_mask import SparseMask

__all__ = ["BaseIdentity", "Digest", "structure_of"]

# A masked tensor is copied to be zeroed where it is masked: piece by piece.
_PIECE = 1 << 22


@dataclass(frozen=True)
class BaseIdentity:
    """What a delta remembers of the model that it was trained from.

    Only what the delta does not replace counts: masked weights are hashed as zeros (a fresh head is
    random in every process), and buffers that the delta sets are left out. A tied tensor counts
    once, under its first name.

    Attributes:
        structure: SHA-256 of the names, shapes and dtypes of the state dict.
        ties: further name of a tied tensor -> its first name; None where that is not known.
        weights: name -> SHA-256 of the weight's data, masked entries as zeros.
        buffers: name -> SHA-256 of each persistent buffer, under all its names; of a checkpoint
            none: there they are among the weights.
    """

    structure: str
    ties: dict[str, str] | None
    weights: dict[str, str]
    buffers: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, mask: SparseMask) -> BaseIdentity:
        """Hash a model (about 1 GB/s a core; on a GPU, tensors are copied to the CPU one by one).

        Args:
            model: the model.
            mask: what is trained.

        Returns:
            Its hashes.

        Raises:
            ValueError: a weight or buffer on the meta device.
        """
        state = model.state_dict(keep_vars=True)
        entries = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if without := [name for name, value in entries.items() if value.is_meta]:
            raise ValueError(f"model must have memory; {without[0]!r} is on the meta device")
        first: dict[int, str] = {}
        ties = {}
        for name, value in entries.items():
            if (own := first.setdefault(id(value), name)) != name:
                ties[name] = own
        own_entries = {name: value for name, value in entries.items() if name not in ties}
        # By object: the mask may name a tied weight by another of its names.
        masked = {id(p): mask[name] for name, p in model.named_parameters() if name in mask}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = pool.map(lambda v: _digest(v, masked.get(id(v))), own_entries.values())
            digests = dict(zip(own_entries, found, strict=True))
        names = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        buffers = {name: digests[ties.get(name, name)] for name in names if name in entries}
        weights = {name: text for name, text in digests.items() if name not in buffers}
        layout = {name: (tuple(v.shape), str(v.dtype)) for name, v in own_entries.items()}
        return cls(structure_of(layout), ties, weights, buffers)

    def content(self, replaced: Collection[str]) -> str:
        """Return the SHA-256 of everything but the masked weights and the replaced buffers."""
        ties = self.ties or {}
        kept = {
            name: text
            for name, text in {**self.weights, **self.buffers}.items()
            if name not in ties and name not in replaced
        }
        return _hash(sorted(kept.items()))

    def refuse_later_ties(self, now: BaseIdentity) -> None:
        """Refuse a model in which a weight was tied or untied, masked or not.

        Args:
            now: of the same model, later.

        Raises:
            RuntimeError: names the weights.
        """
        before, after = (self.ties or {}).items(), (now.ties or {}).items()
        changes = [
            f"{name!r} was {what} {first!r}"
            for what, pairs in (("untied from", before - after), ("tied to", after - before))
            for name, first in sorted(pairs)
        ]
        if changes:
            raise RuntimeError(
                f"weights must be tied or untied before train_only; {', '.join(changes)} after it, "
                "so a delta would fit no base; undo that, and do it before train_only"
            )


def structure_of(layout: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    """Return the SHA-256 of names, shapes and dtypes.

    Args:
        layout: name -> shape and dtype (``str`` of torch's) of every tensor, tied ones once.

    Returns:
        The hash, whatever the order of the names.
    """
    return _hash([(name, *layout[name]) for name in sorted(layout)])


class Digest:
    """SHA-256 of a tensor's bytes in row-major order, masked entries as zeros, piece by piece.

    Args:
        masked: ascending flat indices of the masked entries.
    """

    def __init__(self, masked: Tensor | None = None) -> None:
        self._sha, self._masked, self._start = hashlib.sha256(), masked, 0

    def update(self, piece: Tensor) -> None:
        """Take the next elements: flat, on the CPU; they are not changed."""
        if self._masked is not None and len(self._masked):
            bounds = torch.tensor([self._start, self._start + len(piece)], dtype=self._masked.dtype)
            begin, end = torch.searchsorted(self._masked, bounds).tolist()
            piece = piece.index_fill(0, self._masked[begin:end].long() - self._start, 0)
        self._start += len(piece)
        self._sha.update(raw_bytes(piece))

    def hexdigest(self) -> str:
        """Return the hash of what came so far."""
        return self._sha.hexdigest()


def _digest(tensor: Tensor, masked: Tensor | None) -> str:
    if masked is None and (parts := _parts(tensor.detach())):
        return _hash([part if isinstance(part, str) else _digest(part, None) for part in parts])
    found = Digest(None if masked is None else masked.cpu())
    for piece in tensor.detach().cpu().reshape(-1).split(_PIECE):
        found.update(piece)
    return found.hexdigest()


def _parts(tensor: Tensor) -> list[Tensor | str]:
    """Return what a tensor is made of that has no memory of its own to hash; else nothing.

    That is a sparse one, such as a graph's adjacency, a quantized one, and a subclass around other
    tensors, such as torchao's weights: a quantized base is how large models are tuned.
    """
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return [tensor.int_repr(), f"{tensor.q_scale()!r}, {tensor.q_zero_point()}"]
        scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [tensor.int_repr(), *scales, str(tensor.q_per_channel_axis())]
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in (name, getattr(tensor, name))]
    return []


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
