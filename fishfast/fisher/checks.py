"""What the losses of a batch must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["check_losses", "is_empty", "refuse_mean"]


_ONE_EACH = (
    "loss_fn must return one loss per sample; got {} losses for a batch of {} ({}?); use "
    "reduction='none' and average over each sample's own elements; if a batch is one sample (a "
    "bag), give its tensors a leading dim of 1"
)


def check_losses(losses: Any, batch: Any) -> int | None:
    """Refuse losses that are not one finite number per sample, with a graph.

    Args:
        losses: what a loss_fn gave.
        batch: for what.

    Returns:
        The number of samples of which one loss may be the mean; None where it is none.

    Raises:
        ValueError: others.
    """
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
    if len(losses) == 0:
        return None  # a batch in which no sample counts
    if not losses.requires_grad:
        raise ValueError(
            f"loss_fn must return losses that depend on trainable parameters; got {len(losses)} "
            "losses with requires_grad=False"
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
    size = _num_rows(batch, len(losses))
    if size is not None and len(losses) == 1 < size:
        return size
    if size is not None and len(losses) > size > 0 and len(losses) % size == 0:
        raise ValueError(_ONE_EACH.format(len(losses), size, "one per token"))
    return None


def refuse_mean(size: int) -> NoReturn:
    """Raise for one loss of a batch that depends on more than one of its samples, or may.

    Args:
        size: the batch's samples.

    Raises:
        ValueError: always.
    """
    raise ValueError(_ONE_EACH.format(1, size, "their mean"))


def is_empty(batch: Any) -> bool:
    """Return whether a batch is tensors without rows, such as what a Poisson sampler may give."""
    shapes = _shapes(batch)
    return bool(shapes) and all(shape[0] == 0 for shape in shapes)


def _num_rows(batch: Any, num_losses: int) -> int | None:
    """Return the size that dim 0 has in every tensor of a batch; None where it may be no sample."""
    shapes = _shapes(batch)
    rows = {shape[0] for shape in shapes}
    # A batch with time first, [T, B] in every tensor, has B losses too.
    if len(rows) != 1 or all(num_losses in shape[1:] for shape in shapes):
        return None
    return rows.pop()


def _shapes(batch: Any) -> list[torch.Size]:
    """Return the shapes of a batch of tensors; none of one with its own idea of a sample.

    Lists of images and of labels are such a batch.
    """
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return []
    return [leaf.shape for leaf in leaves if leaf.dim()]
