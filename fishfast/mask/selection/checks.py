"""What scores must be: refused by name before anything is selected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishfast._backend import STORAGE
from fishfast.files.stored_tensors import StoredTensor

__all__ = ["BadScore", "Scores", "check_scores"]

Scores = Tensor | StoredTensor


class BadScore(Exception):
    """A NaN or negative score among the tensors of one pass."""

    def __init__(self, tensor: int, index: int, value: float) -> None:
        super().__init__(tensor, index, value)
        self.tensor, self.index, self.value = tensor, index, value

    def of(self, name: str, start: int) -> ValueError:
        """Return the error that names the score; ``start`` is where its tensor was cut."""
        return ValueError(
            f"scores must be >= 0 and not NaN; got {self.value} at flat index "
            f"{start + self.index} of {name!r}"
        )


def check_scores(scores: Mapping[str, Scores]) -> torch.device:
    """Return the device of all scores; refuse what is not a mapping to dense tensors on one."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores must be a mapping of names to tensors; got {type(scores).__name__}; "
            "estimate_fisher and magnitude_scores return one"
        )
    if not scores:
        raise ValueError("scores must cover at least one weight; got an empty mapping")
    for name, score in scores.items():
        if not isinstance(name, str):
            raise TypeError(f"scores must go by names of parameters; got {name!r}")
        got: object = None
        if not isinstance(score, (Tensor, StoredTensor)):
            got = type(score).__name__
        elif score.dtype not in STORAGE:
            got = score.dtype
        elif isinstance(score, Tensor) and score.layout != torch.strided:
            got = score.layout
        if got is not None:
            raise TypeError(
                f"scores must be dense float32, bfloat16 or float16 tensors; got {got} for {name!r}"
            )
    devices = {score.device: name for name, score in scores.items()}
    if len(devices) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"scores must be on one device; got {listed}; move them with .to()")
    (device,) = devices
    if device.type == "meta":
        raise ValueError("scores must have values; got tensors on the meta device")
    return device
