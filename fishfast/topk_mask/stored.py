"""`open_scores`: the scores of a safetensors file, read piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fishfast._files import PathLike

__all__ = ["ScoreFile", "StoredScore", "open_scores"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredScore:
    """One tensor of a score file: its shape and dtype now, its scores when they are asked for.

    Attributes:
        path: the file.
        shape: as stored.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        device: the CPU.
    """

    def __init__(
        self, path: str, identity: tuple[int, ...], shape: torch.Size, dtype: torch.dtype,
        offset: int,
    ) -> None:  # fmt: skip
        self.path, self.shape, self.dtype = path, shape, dtype
        self.device = torch.device("cpu")
        self._identity, self._offset = identity, offset

    def numel(self) -> int:
        """Return the number of scores."""
        return math.prod(self.shape)

    def read_into(self, flat: Tensor, start: int) -> None:
        """Read consecutive scores from the file.

        Args:
            flat: where to; contiguous, of this dtype, on the CPU.
            start: flat index of the first one.

        Raises:
            ValueError: the file is not the one that was opened.
        """
        buffer = flat.view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            if identity_of(os.fstat(file.fileno())) != self._identity:
                raise ValueError(f"{self.path!r} has changed since it was opened; open it again")
            file.seek(self._offset + start * flat.element_size())
            filled = 0
            while filled < len(buffer):  # a read may stop early
                got = file.readinto(buffer[filled:])
                if not got:
                    raise ValueError(f"{self.path!r} has become shorter since it was opened")
                filled += got


def identity_of(stat: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class ScoreFile(Mapping[str, StoredScore]):
    """The scores of a file by parameter name, in the order that decides ties."""

    def __init__(self, path: str, scores: Mapping[str, StoredScore]) -> None:
        self.path = path
        self._scores = dict(scores)

    def __getitem__(self, name: str) -> StoredScore:
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
    identity = identity_of(os.stat(text))
    try:
        with safe_open(text, framework="pt") as file:  # refuses what is not whole and consistent
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{text!r} is not a whole safetensors file: {error}") from error
    entries, data_start = _read_header(Path(text))
    stored = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{text!r}: scores must be float32, bfloat16 or float16; {name!r} is "
                f"{entry['dtype']}"
            )
        stored[name] = StoredScore(
            text,
            identity,
            torch.Size(entry["shape"]),
            _DTYPES[entry["dtype"]],
            data_start + entry["data_offsets"][0],
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


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what safetensors says of each tensor, and where the data starts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError(f"{str(path)!r} names a tensor twice in its header")
        return dict(pairs)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length), object_pairs_hook=unique)
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _order_of_fisher(path: str, metadata: Mapping[str, str]) -> list[str]:
    try:
        return list(json.loads(metadata["roads"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} has a broken header: {error!r}") from error
