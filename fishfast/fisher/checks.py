"""What the losses of a batch must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["check_losses"]


def check_losses(losses: Any, batch: Any) -> None:
    """Refuse losses that are not one finite number per sample, with a graph."""
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"loss_fn must return a tensor of per-sample losses; got {type(losses).__name__}"
        )
    if losses.dim() != 1:
        got = "a scalar" if losses.dim() == 0 else f"shape {tuple(losses.shape)}"
        raise ValueError(
            f"loss_fn must return one loss per sample, shape [B]; got {got}; "
            "use reduction='none' and average over each sample's own elements"
        )
    if len(losses) == 0 or not losses.requires_grad:
        raise ValueError(
            f"loss_fn must return losses that depend on trainable parameters; got {len(losses)} "
            f"losses with requires_grad={losses.requires_grad}"
        )
    if not torch.isfinite(losses).all():
        index = int((~torch.isfinite(losses)).nonzero()[0])
        value = float(losses[index].detach())
        raise ValueError(f"loss_fn must return finite losses; got {value} for sample {index}")
    if len(losses) > 1 and losses.stride(0) == 0:
        raise ValueError(
            "loss_fn must return losses that depend on one sample each; got one value expanded to "
            f"{len(losses)}; use reduction='none'"
        )
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return  # a batch with its own idea of a sample, such as lists of images and of labels
    shapes = [leaf.shape for leaf in leaves if leaf.dim()]
    rows = {shape[0] for shape in shapes}
    # A batch with time first, [T, B] in every tensor, has B losses too.
    if len(rows) == 1 and not all(len(losses) in shape[1:] for shape in shapes):
        (size,) = rows
        mean = len(losses) == 1 < size
        if mean or (len(losses) > size > 0 and len(losses) % size == 0):
            raise ValueError(
                f"loss_fn must return one loss per sample; got {len(losses)} losses for a batch of "
                f"{size} ({'their mean' if mean else 'one per token'}?); use reduction='none' and "
                "average over each sample's own elements; if a batch is one sample (a bag), give "
                "its tensors a leading dim of 1"
            )
