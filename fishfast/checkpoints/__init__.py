"""Deltas and safetensors checkpoints on disk, tensor by tensor, without the model in memory."""

from fishfast.checkpoints.apply import Applied, apply_to_checkpoint
from fishfast.checkpoints.diff import diff_checkpoints
from fishfast.checkpoints.files import Checkpoint, open_checkpoint

__all__ = [
    "Applied",
    "Checkpoint",
    "apply_to_checkpoint",
    "diff_checkpoints",
    "open_checkpoint",
]
