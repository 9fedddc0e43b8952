"""The memory of the scores: one buffer for all of a device, so that one call looks at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fishfast.fisher.foreign import zeros_of_part

__all__ = ["all_finite", "buffers_of", "zero_scores"]

_ALIGNED = 64  # elements: 256 bytes, as torch's own allocations on a GPU; vector loads ask for 16


def zero_scores(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return fp32 zeros of the parameters' strides, so that views of a parameter fit its scores.

    Args:
        parameters: by name.

    Returns:
        By name; views of one buffer for each device.
    """
    ends: dict[torch.device, int] = {}
    places = {}
    for name, parameter in parameters.items():
        if type(parameter) is nn.Parameter:
            places[name] = ends.get(parameter.device, 0)
            ends[parameter.device] = places[name] + -(-parameter.numel() // _ALIGNED) * _ALIGNED
    flat = {device: torch.zeros(end, device=device) for device, end in ends.items()}
    scores = {}
    for name, parameter in parameters.items():
        if name not in places:  # a subclass lays its elements out by itself
            scores[name] = zeros_of_part(parameter)
            continue
        like = torch.empty_like(parameter, dtype=torch.float32, device="meta")
        buffer = flat[parameter.device]
        scores[name] = buffer.as_strided(like.shape, like.stride(), places[name])
    return scores


def buffers_of(scores: Iterable[Tensor]) -> list[Tensor]:
    """Return the memory behind these scores as few flat tensors, each part of it once."""
    found: dict[int, Tensor] = {}
    for score in scores:
        storage = score.untyped_storage()
        if type(score) is not Tensor or storage.nbytes() % score.element_size():
            found[id(score)] = score
        elif storage.data_ptr() not in found:
            whole = torch.empty(0, dtype=score.dtype, device=score.device)
            found[storage.data_ptr()] = whole.set_(storage)
    return list(found.values())


def all_finite(buffers: Iterable[Tensor]) -> bool:
    """Return whether all values, none below 0, are finite. Waits once for each device."""
    sums: dict[torch.device, list[Tensor]] = {}
    buffers = list(buffers)
    for buffer in buffers:
        sums.setdefault(buffer.device, []).append(buffer.sum())
    if all(bool(torch.stack(parts).isfinite().all()) for parts in sums.values()):
        return True
    return all(bool(buffer.isfinite().all()) for buffer in buffers)  # a sum may overflow alone
