"""What a selection of the k largest scores must be, told without sorting them.

Of every score there is one comparison, in the memory of one byte per score of the largest tensor:
it is checked at the size that is timed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import fishfast as ff

__all__ = ["Scores", "check", "joined"]

Scores = Mapping[str, Tensor]


def joined(scores: Scores) -> Tensor:
    """Return all scores as one tensor.

    Args:
        scores: name -> scores.
    """
    tensors = list(scores.values())
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def check(found: ff.SparseMask | Tensor, scores: Scores, k: int) -> None:
    """Refuse what is not k different scores, with no larger one left.

    A mask must be what a stable sort selects: of equal scores the first ones.

    Args:
        found: a mask, or indices into the joined scores, in any order and of any of equal scores.
        scores: what was selected from.
        k: how many.

    Raises:
        AssertionError: the selection is wrong.
    """
    if isinstance(found, Tensor):
        distinct = len(found.unique())
        selected = joined(scores)[found.long()]
    else:
        distinct = sum(
            int((found[name].diff() > 0).sum()) + 1 for name in found if len(found[name])
        )
        selected = torch.cat([scores[name].view(-1)[found[name].long()] for name in found])
    assert distinct == len(selected) == k, "not k different scores"
    threshold = selected.min()
    larger = sum(int((score > threshold).sum()) for score in scores.values())
    assert int((selected > threshold).sum()) == larger, "not the largest scores"
    if isinstance(found, ff.SparseMask):
        _check_ties(found, scores, threshold, k - larger)


def _check_ties(found: ff.SparseMask, scores: Scores, threshold: Tensor, selected: int) -> None:
    """Count the scores equal to the threshold, up to the last that was selected.

    The selected ones are among these: where they are as many, they are the first ones.
    """
    ties = {}
    for name, score in scores.items():
        indices = found[name].long()
        if len(tied := indices[score.view(-1)[indices] == threshold]):
            ties[name] = int(tied[-1])
    last, counted = list(ties)[-1], 0
    for name, score in scores.items():
        part = score.view(-1)[: ties[last] + 1] if name == last else score
        counted += int((part == threshold).sum())
        if name == last:
            break
    assert counted == selected, "not what a stable sort selects: other scores of the same value"
