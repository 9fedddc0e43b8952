"""The memory of the scores: one buffer for all of a device, so that one call looks at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishfast.fisher.engine.staged_scores import StagedScores
from fishfast.fisher.foreign import zeros_of_part

__all__ = ["Scores", "all_finite", "buffers_of", "checked_device", "zero_scores"]

_ALIGNED = 64  # elements: 256 bytes, as torch's own allocations on a GPU; vector loads ask for 16


def checked_device(device: Any) -> torch.device | None:
    """Return where scores are to live, None for where their parameters are.

    Args:
        device: as `estimate_fisher` takes it.

    Returns:
        The device.

    Raises:
        TypeError: no name of a device.
        ValueError: an unknown one, one that holds no values, or one that is not here.
    """
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"scores_device must be a device or a name, such as 'cpu'; got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"scores_device must be a device that torch knows, such as 'cpu'; got {str(device)!r}"
        ) from None
    if found.type == "meta":
        raise ValueError("scores_device must be a device that holds values; got 'meta'")
    try:
        return torch.empty(0, device=found).device  # with its number
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"scores_device must be a device that is here; got {str(device)!r}: {error}"
        ) from error


class Scores(dict[str, Tensor]):
    """Scores by name, each where its parameter is.

    Args:
        kept: the scores.

    Attributes:
        kept: where they live: here.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        super().__init__(kept)
        self.kept: Mapping[str, Tensor] = self
        self._memory = buffers_of(kept.values())

    def trim(self) -> None:
        """Do nothing: all of them are where they are added to."""

    def settle(self) -> bool:
        """Return whether all are finite."""
        return all_finite(self._memory)


def zero_scores(
    parameters: Mapping[str, nn.Parameter], device: torch.device | None = None
) -> Scores | StagedScores:
    """Return fp32 zeros of the parameters' strides, so that views of a parameter fit its scores.

    Args:
        parameters: by name.
        device: where they live; None: each where its parameter is.

    Returns:
        By name; views of one buffer for each device.
    """
    ends: dict[torch.device, int] = {}
    places = {}
    for name, parameter in parameters.items():
        if type(parameter) is nn.Parameter:
            on = device or parameter.device
            places[name] = ends.get(on, 0)
            ends[on] = places[name] + -(-parameter.numel() // _ALIGNED) * _ALIGNED
    flat = {on: torch.zeros(end, device=on) for on, end in ends.items()}
    scores = {}
    for name, parameter in parameters.items():
        if name not in places:  # a subclass lays its elements out by itself
            zeros = zeros_of_part(parameter)
            scores[name] = zeros if device is None else zeros.to(device)
            continue
        like = torch.empty_like(parameter, dtype=torch.float32, device="meta")
        buffer = flat[device or parameter.device]
        scores[name] = buffer.as_strided(like.shape, like.stride(), places[name])
    devices = {name: parameter.device for name, parameter in parameters.items()}
    if any(_is_elsewhere(score, devices[name]) for name, score in scores.items()):
        return StagedScores(scores, devices)
    return Scores(scores)


def _is_elsewhere(score: Tensor, device: torch.device) -> bool:
    return score.device != device


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
