"""What scores must be: refused by name before anything is selected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["STORAGE", "check_scores", "refuse", "refuse_bad"]

# Score dtypes, and their codes in csrc/storage.h.
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check_scores(scores: Mapping[str, Tensor]) -> torch.device:
    """Return the device of all scores; refuse what is not a mapping to dense tensors on one."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"scores must be a mapping of names to tensors; got {type(scores).__name__}; "
            "estimate_fisher and magnitude_scores return one"
        )
    if not scores:
        raise ValueError("scores must cover at least one weight; got an empty mapping")
    for name, score in scores.items():
        got: object = None
        if not isinstance(score, Tensor):
            got = type(score).__name__
        elif score.dtype not in STORAGE:
            got = score.dtype
        elif score.layout != torch.strided:
            got = score.layout
        if got is not None:
            raise TypeError(
                f"scores must be dense float32, bfloat16 or float16 tensors; got {got} for {name!r}"
            )
    devices = {score.device: name for name, score in scores.items()}
    if len(devices) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"scores must be on one device; got {listed}; move them with .to()")
    return next(iter(devices))


def refuse_bad(name: str, score: Tensor) -> None:
    """Refuse NaN and negative scores of one tensor."""
    # min() hands NaN on, and needs no mask of n elements unless there is something to report.
    if score.numel() and not score.min() >= 0:
        refuse(name, score, int((~(score >= 0)).flatten().nonzero()[0]))


def refuse(name: str, score: Tensor, index: int) -> None:
    """Raise the error that names the bad score."""
    value = float(score.flatten()[index])
    raise ValueError(
        f"scores must be >= 0 and not NaN; got {value} at flat index {index} of {name!r}"
    )
