"""`open_scores`: the scores of a safetensors file, read piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import torch

from fishfast.files.atomic import PathLike
from fishfast.files.stored_tensors import StoredTensor, open_tensors

__all__ = ["ScoreFile", "open_scores"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ScoreFile(Mapping[str, StoredTensor]):
    """The scores of a file by parameter name, in the order that decides ties."""

    def __init__(self, path: str, scores: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self._scores = dict(scores)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        weights = sum(score.numel() for score in self.values())
        return f"ScoreFile({self.path!r}, {weights:,} weights in {len(self)} tensors)"


def open_scores(path: PathLike) -> ScoreFile:
    """Open a file of scores without reading them: `top_k_mask` does, a few megabytes at a time.

    For scores that do not fit in memory, one tensor included. The mask is that of the same scores
    in memory, bit for bit. The checksum that `Fisher.save` writes is not compared, which would
    take one more reading; `Fisher.load` compares it. The file must not change while it is used.

    Args:
        path: a safetensors file: one that `Fisher.save` wrote, or any other with fp32, bf16 or
            fp16 tensors, which must be >= 0.

    Returns:
        A mapping from name to a tensor's shape, dtype and place. The order of the names, which
        decides ties, is the order in which `Fisher.save` had them; in other files that of the
        data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, or a dtype that is none of the above.

    Example:
        >>> import tempfile, torch, fishfast as ff
        >>> path = tempfile.mkdtemp() + "/scores.safetensors"
        >>> ff.Fisher({"w": torch.tensor([1.0, 4.0, 2.0])}, num_samples=1).save(path)
        >>> ff.top_k_mask(ff.open_scores(path), k=2)["w"]
        tensor([1, 2], dtype=torch.int32)
    """
    text = os.path.abspath(os.fspath(path))
    stored, metadata = open_tensors(text)
    for name, score in stored.items():
        if score.dtype not in _DTYPES:
            raise ValueError(
                f"{text!r}: scores must be float32, bfloat16 or float16; {name!r} is {score.dtype}"
            )
    if metadata.get("format") == "fishfast.fisher":
        order = _order_of_fisher(text, metadata)
        if unmatched := set(order) ^ set(stored):
            raise ValueError(
                f"{text!r} has a broken header: {min(unmatched)!r} is in its roads or its scores "
                "only"
            )
        stored = {name: stored[name] for name in order}
    return ScoreFile(text, stored)


def _order_of_fisher(path: str, metadata: Mapping[str, str]) -> list[str]:
    try:
        return list(json.loads(metadata["roads"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} has a broken header: {error!r}") from error
