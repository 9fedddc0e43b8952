"""The selection in CUDA (csrc/topk_mask.cu): two reads of the scores, one wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fishfast import _backend, _tables
from fishfast._backend import STORAGE
from fishfast.mask.selection.checks import BadScore
from fishfast.mask.sparse_mask import index_dtype

__all__ = ["select_cuda"]

# csrc/launch.h, structs TopkRow and TopkParams.
_ROW_DTYPE = np.dtype(
    [("data", "<u8"), ("numel", "<i8"), ("storage", "<i4"), ("padding", "<i4"),
     ("first_tile", "<i8")]
)  # fmt: skip
_PARAMS_DTYPE = np.dtype(
    [("rows", "<u8")]
    + [(name, "<i8") for name in ("num_tensors", "num_tiles", "scores_per_tile", "k")]
    + [(name, "<i8") for name in ("stream_capacity", "max_blocks", "max_shared_bytes")]
    + [("workspace", "<u8"), ("indices", "<u8"), ("wide_indices", "<i4"), ("zero_bits", "<i4")]
)
_RESULT_NUMBERS = 3  # struct TopkResult: bad_tensor, bad_index, num_zero_score

# Up to one score in so many is set aside by the second read (8 bytes each), which then is the last;
# where k is larger, a third read costs less than writing so many and reading them again.
_SCORES_PER_STREAM_ENTRY = 32


def select_cuda(names: Sequence[str], scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], int]:
    """Return the indices per tensor, and how many of them have score 0."""
    device = scores[0].device
    scores = [score.contiguous() for score in scores]
    dtypes = [index_dtype(score.numel()) for score in scores]
    wide = torch.int64 in dtypes
    flat = torch.empty(k, dtype=torch.int64 if wide else torch.int32, device=device)
    bad_tensor, bad_index, num_zero_score, *counts = _launch(scores, k, flat)
    if bad_tensor >= 0:
        value = float(scores[bad_tensor].view(-1)[bad_index])
        raise BadScore(bad_tensor, bad_index, value).of(names[bad_tensor], 0)
    # Beside a wide tensor the narrow ones are converted; otherwise .to() changes nothing.
    slices = zip(flat.split(counts), dtypes, strict=True)
    return [found.to(dtype) for found, dtype in slices], num_zero_score


def _launch(scores: Sequence[Tensor], k: int, indices: Tensor) -> list[int]:
    """Write ``indices`` and return TopkResult, followed by the number selected of each tensor."""
    extension = _backend.compiled()
    assert _ROW_DTYPE.itemsize == extension.TOPK_ROW_BYTES
    assert _PARAMS_DTYPE.itemsize == extension.TOPK_PARAMS_BYTES
    device = indices.device
    rows = np.zeros(len(scores), _ROW_DTYPE)
    rows["data"] = [score.data_ptr() for score in scores]
    rows["numel"] = [score.numel() for score in scores]
    rows["storage"] = [STORAGE[score.dtype] for score in scores]
    num_tiles = -(-rows["numel"] // extension.TOPK_SCORES_PER_TILE)
    rows["first_tile"] = np.cumsum(num_tiles) - num_tiles
    table = _tables.to_device(rows, device)

    params = np.zeros((), _PARAMS_DTYPE)
    params["rows"] = table.data_ptr()
    params["num_tensors"] = len(scores)
    params["num_tiles"] = num_tiles.sum()
    params["scores_per_tile"] = extension.TOPK_SCORES_PER_TILE
    params["k"] = k
    params["indices"] = indices.data_ptr()
    params["wide_indices"] = indices.dtype == torch.int64
    only_bfloat16 = all(score.dtype == torch.bfloat16 for score in scores)
    params["zero_bits"] = 16 if only_bfloat16 else 0
    if not only_bfloat16:
        params["stream_capacity"] = rows["numel"].sum() // _SCORES_PER_STREAM_ENTRY
    num_bytes = extension.topk_mask_workspace_bytes(params.ctypes.data)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    params["workspace"] = workspace.data_ptr()
    _tables.launch_on(device, extension.topk_mask_cuda, params.ctypes.data)
    result_bytes = 8 * (_RESULT_NUMBERS + len(scores))
    return workspace[:result_bytes].view(torch.int64).tolist()  # the one wait
