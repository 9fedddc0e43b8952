"""What is differentiated: the losses of a batch, or what its outputs say of all labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishfast.fisher.checks import check_losses
from fishfast.fisher.heads import output_rows
from fishfast.fisher.outputs import default_outputs

__all__ = ["LossFn", "Losses", "Objective", "OutputsFn", "empirical", "over_labels"]

LossFn = Callable[[nn.Module, Any], Tensor]
# Outputs, or a pair of outputs and counted positions.
OutputsFn = Callable[[nn.Module, Any], Any]


class Losses(NamedTuple):
    """What one forward gives.

    Attributes:
        probe: one number per sample, ``[B]``, which depends on all that the rows depend on.
        rows: called once the forward is settled; yields vectors ``[B]``, the squares (or absolute
            values) of whose per-sample gradients add up. Draws, if there are any, are made here.
        mean_of: how many samples the one loss may be the mean of; None where it is none.
    """

    probe: Tensor
    rows: Callable[[], Iterator[Tensor]]
    mean_of: int | None = None


Objective = Callable[[nn.Module, Any], Losses]


def empirical(loss_fn: LossFn) -> Objective:
    """Return the objective of the labels given: one loss per sample."""

    def objective(model: nn.Module, batch: Any) -> Losses:
        losses = loss_fn(model, batch)
        mean_of = check_losses(losses, batch)
        return Losses(losses, lambda: iter((losses,)), mean_of)

    return objective


def over_labels(
    outputs_fn: OutputsFn | None,
    head: str | None,
    fisher_type: str,
    power: int,
    num_label_samples: int,
    generator: torch.Generator,
) -> Objective:
    """Return the objective of the model's own labels: all of them, or draws.

    Args:
        outputs_fn: returns the outputs; None for a transformers-style model and batch.
        head: what the outputs are; with ``outputs_fn`` only.
        fisher_type: "exact" or "sampled".
        power: 2 or 1.
        num_label_samples: draws of "sampled".
        generator: where draws come from.

    Returns:
        The objective.
    """

    def objective(model: nn.Module, batch: Any) -> Losses:
        if outputs_fn is None:
            outputs, kind, counted = default_outputs(model, batch)
        else:
            given = outputs_fn(model, batch)
            outputs, counted = given if isinstance(given, tuple) else (given, None)
            kind = head or "softmax"
        if isinstance(outputs, Tensor) and outputs.dim() and len(outputs) == 0:
            return Losses(outputs.flatten(), lambda: iter(()))
        if (
            not isinstance(outputs, Tensor)
            or 0 in (outputs.dim(), outputs.numel())
            or not outputs.requires_grad
        ):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
            raise ValueError(
                f"outputs_fn must return outputs [B, ...] that depend on parameters; got {got}"
            )

        def rows() -> Iterator[Tensor]:
            return output_rows(
                outputs, kind, fisher_type, power, num_label_samples, generator, counted
            )

        # Uneven weights, so that no gradient cancels, as that of a sum of softmax outputs would.
        weights = torch.linspace(0.5, 1.5, outputs[0].numel(), device=outputs.device)
        probe = (outputs.flatten(1) if outputs.dim() > 1 else outputs.unsqueeze(1)).float()
        return Losses((probe * weights).sum(1), rows)

    return objective
