"""Names a base model by two hashes, so that a delta is never applied to another one."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishfast.mask import SparseMask

__all__ = ["BaseIdentity", "structure_hash"]


@dataclass(frozen=True)
class BaseIdentity:
    """What a delta remembers of the model that it was trained from.

    Attributes:
        structure: SHA-256 of the names, shapes, dtypes and ties of the state dict.
        content: SHA-256 of its values, without parameters that the mask covers whole: a fresh head
            is random in every process, and the delta replaces it anyway.
        buffers: digest of each persistent buffer, by which changed ones are found.
    """

    structure: str
    content: str
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
        parameters = dict(model.named_parameters())
        whole = {
            id(parameters[name])
            for name, found in mask.items()
            if name in parameters and len(found) == parameters[name].numel() > 0
        }
        hashed = {name: v for name, v in _entries(model).items() if id(v) not in whole}
        if without := [name for name, value in hashed.items() if value.is_meta]:
            raise ValueError(f"model must have memory; {without[0]!r} is on the meta device")
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            digests = dict(zip(hashed, pool.map(_digest, hashed.values()), strict=True))
        buffers = {name for name, _ in model.named_buffers()}
        return cls(
            structure=structure_hash(model),
            content=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
            buffers={name: digest for name, digest in digests.items() if name in buffers},
        )

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the persistent buffers whose values are not the base's any more."""
        buffers = dict(model.named_buffers())
        return {
            name: buffers[name]
            for name, digest in self.buffers.items()
            if _digest(buffers[name]) != digest
        }


def structure_hash(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and ties of a model's state dict."""
    first: dict[int, str] = {}  # a tied tensor is known by its first name
    layout = [
        (name, tuple(v.shape), str(v.dtype), first.setdefault(id(v), name))
        for name, v in _entries(model).items()
    ]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def _entries(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
