"""The selection in C++ on CPU threads (csrc/topk_mask_cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishfast import _backend
from fishfast.mask import index_dtype
from fishfast.topk_mask.checks import STORAGE, refuse

__all__ = ["select_cpu"]


def select_cpu(names: Sequence[str], scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], int]:
    """Return the indices per tensor, and how many of them have score 0."""
    scores = [score.contiguous() for score in scores]
    selection = _backend.compiled().TopkSelection(
        [(score.data_ptr(), score.numel(), STORAGE[score.dtype]) for score in scores],
        k=k,
        num_threads=_backend.num_threads(),
    )
    if selection.bad_tensor >= 0:
        bad = selection.bad_tensor
        refuse(names[bad], scores[bad], selection.bad_index)
    counts = selection.num_selected
    dtypes = [index_dtype(score.numel()) for score in scores]
    # One flat buffer per index width; each tensor's indices are a slice of it.
    buffers = {
        dtype: torch.empty(
            sum(count for count, other in zip(counts, dtypes, strict=True) if other == dtype),
            dtype=dtype,
        )
        for dtype in set(dtypes)
    }
    filled = dict.fromkeys(buffers, 0)
    indices = []
    for count, dtype in zip(counts, dtypes, strict=True):
        indices.append(buffers[dtype][filled[dtype] : filled[dtype] + count])
        filled[dtype] += count
    selection.emit(
        [found.data_ptr() for found in indices], [dtype == torch.int64 for dtype in dtypes]
    )
    return indices, selection.num_zero_score
