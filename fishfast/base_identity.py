"""Names a base model by two hashes, so that a delta is never applied to another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishfast._files import raw_bytes
from fishfast.mask import SparseMask

__all__ = ["BaseIdentity"]


@dataclass(frozen=True)
class BaseIdentity:
    """What a delta remembers of the model that it was trained from.

    Only what the delta does not replace counts: masked weights are hashed as zeros (a fresh head is
    random in every process), and buffers that the delta sets are left out.

    Attributes:
        structure: SHA-256 of the names, shapes, dtypes and ties of the state dict.
        weights: SHA-256 of the weights outside the mask.
        buffers: SHA-256 of each persistent buffer.
    """

    structure: str
    weights: str
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
        entries = _entries(model)
        if without := [name for name, value in entries.items() if value.is_meta]:
            raise ValueError(f"model must have memory; {without[0]!r} is on the meta device")
        # By object, so that a tied weight is the masked one under all its names.
        masked = {id(p): mask[name] for name, p in model.named_parameters() if name in mask}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = pool.map(lambda value: _digest(value, masked.get(id(value))), entries.values())
            digests = dict(zip(entries, found, strict=True))
        buffer_names = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        buffers = {name: digests.pop(name) for name in buffer_names if name in digests}
        return cls(_structure(model), _hash(digests), buffers)

    def content(self, replaced: Collection[str]) -> str:
        """Return the SHA-256 of everything but the masked weights and the replaced buffers."""
        kept = {name: digest for name, digest in self.buffers.items() if name not in replaced}
        return _hash([self.weights, kept])


def _structure(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and ties of a model's state dict."""
    first: dict[int, str] = {}  # a tied tensor is known by its first name
    layout = [
        (name, tuple(v.shape), str(v.dtype), first.setdefault(id(v), name))
        for name, v in _entries(model).items()
    ]
    return _hash(layout)


def _entries(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _digest(tensor: Tensor, masked: Tensor | None) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order, masked entries as zeros."""
    if tensor.layout == torch.sparse_coo:  # such as a graph's adjacency
        parts = tensor.detach().coalesce()
        return _hash([_digest(parts.indices(), None), _digest(parts.values(), None)])
    flat = tensor.detach().cpu().reshape(-1)
    if masked is not None and len(masked):
        flat = flat.index_fill(0, masked.cpu().long(), 0)
    return hashlib.sha256(raw_bytes(flat)).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
