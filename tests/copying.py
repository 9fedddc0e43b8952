"""Ways to copy a thing through pickle and files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

import fishfast as ff


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def pickled_with_protocol_0(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing, protocol=0))


def through_a_file(
    tuned: ff.SparseTuning, optimizer: torch.optim.Optimizer, path: Path
) -> dict[str, Any]:
    """Return the state dicts of model and optimizer, saved by torch and loaded without pickle."""
    state = {"model": tuned.model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def saved_by_torch(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
