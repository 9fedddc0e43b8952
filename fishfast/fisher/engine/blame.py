"""Finds the sample and the parameter with a gradient that is not finite, for the message."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fishfast.fisher.batch_copy import copied_batch
from fishfast.fisher.engine.gradients import gradients
from fishfast.fisher.engine.interception import NEVER
from fishfast.fisher.engine.scorer import Scorer

__all__ = ["blame"]


def blame(scorer: Scorer, batch: Any) -> str:
    """Return what is wrong with a batch whose scores are not finite.

    The batch is run again; the scorer cannot be used afterwards.
    """
    with scorer.scoring():
        index, name = _culprit(scorer, batch) or _culprit_alone(scorer, batch) or (None, None)
    if name is not None:
        return (
            f"gradients must be finite; that of {name!r} is not for sample {index} of the batch; "
            "nothing of it was kept; check the sample and the losses"
        )
    return (
        "scores must be finite; a batch has gradients above 1.8e19, whose squares overflow fp32; "
        "nothing of it was kept; scale the losses down"
    )


def _culprit(scorer: Scorer, batch: Any) -> tuple[int, str] | None:
    """Return the sample and a parameter of the first row behind the losses that is spoiled.

    The loss of another sample reaches such a row too, with 0 times infinity.
    """
    losses, found = scorer.forwards.run(batch)
    scorer.rows.known(found, losses.probe)
    culprits: list[tuple[int, str]] = []

    def look(node: Any, x: Tensor | None, grad: Tensor) -> None:
        if node.rows is None or culprits:
            return
        spoiled = _spoiled(grad, node.lead)
        if x is not None and x.shape[: len(node.lead)] == node.lead:  # infinite where grad is 0
            spoiled |= _spoiled(x, node.lead)
        samples = node.rows.samples(grad.device)[spoiled]
        names = [operand.names[0] for operand in node.operands if operand is not None]
        culprits.extend((int(sample), names[0]) for sample in samples[samples >= 0])

    scorer.backwards.run(losses.probe.sum(), look)
    return culprits[0] if culprits else None


def _spoiled(rows: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return bool [rows]: which have a number that is not finite."""
    width = prod(rows.shape[len(lead) :])
    return ~rows.reshape(prod(lead), width).isfinite().all(-1)


def _culprit_alone(scorer: Scorer, batch: Any) -> tuple[int, str] | None:
    """Return the sample and the parameter where autograd's own gradient is not finite."""
    scorer.interception.levels.update(dict.fromkeys(scorer.parameters, NEVER))
    losses = scorer.objective(scorer.model, copied_batch(batch)[0]).probe
    for index, loss in enumerate(losses):
        grads = gradients(loss, list(scorer.parameters.values()))
        for name, grad in zip(scorer.parameters, grads, strict=True):
            if grad is not None and not torch.isfinite(grad).all():
                return index, name
    return None
