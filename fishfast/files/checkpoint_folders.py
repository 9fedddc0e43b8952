"""`open_checkpoint`: the tensors of one safetensors file, or of a folder with several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fishfast.files.atomic import PathLike
from fishfast.files.stored_tensors import StoredTensor, open_tensors

__all__ = ["Checkpoint", "Shard", "open_checkpoint"]

_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint.

    Attributes:
        tensors: name -> tensor, in the order of the data.
        metadata: the header's own entries, such as ``{"format": "pt"}``.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint by name, none of them read yet.

    Attributes:
        path: the file or folder.
        shards: file name -> its tensors.
        index_name: file name of the index, None where one file has everything.
        index: the contents of the index, {} likewise.
    """

    def __init__(
        self, path: Path, shards: dict[str, Shard], index_name: str | None, index: dict[str, Any]
    ) -> None:
        self.path, self.shards, self.index_name, self.index = path, shards, index_name, index
        self._tensors: dict[str, StoredTensor] = {}
        for file_name, shard in shards.items():
            if twice := shard.tensors.keys() & self._tensors:
                raise ValueError(
                    f"{str(path)!r} must hold every tensor once; {min(twice)!r} is in "
                    f"{file_name!r} and in another file"
                )
            self._tensors |= shard.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {self.nbytes:,} bytes in {len(self)} tensors and "
            f"{len(self.shards)} files)"
        )

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.values())


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a checkpoint without reading its data.

    Args:
        path: a safetensors file, or a folder as transformers' ``save_pretrained`` writes it: with
            ``model.safetensors``, or with one other safetensors file, or with shards and their
            index ``*.safetensors.index.json``.

    Returns:
        A mapping from name to a tensor's shape, dtype and place.

    Raises:
        FileNotFoundError: nothing there, or a shard that is missing.
        ValueError: not whole safetensors files, a folder without any or with several that no index
            names, an index that does not agree with its shards, or a tensor in two of them.
    """
    where = Path(path)
    if not where.is_dir():
        return Checkpoint(where, {where.name: Shard(*open_tensors(where))}, None, {})
    files = sorted(file.name for file in where.glob("*.safetensors"))
    indices = sorted(file.name for file in where.glob("*" + _INDEX))
    # In this order, as transformers does.
    if "model.safetensors" in files or (len(files) == 1 and not indices):
        name = "model.safetensors" if "model.safetensors" in files else files[0]
        return Checkpoint(where, {name: Shard(*open_tensors(where / name))}, None, {})
    if len(indices) != 1:
        found = ", ".join([*files, *indices][:4]) or "none"
        raise ValueError(
            f"the folder {str(where)!r} must have model.safetensors, one other safetensors file, "
            f"or one index *{_INDEX}; found: {found}; name the file itself"
        )
    index = _read_index(where / indices[0])
    names = sorted(set(index["weight_map"].values()))
    if missing := [name for name in names if not (where / name).exists()]:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise FileNotFoundError(
            f"{str(where / indices[0])!r} names {missing[0]!r}{more}, which must be beside it"
        )
    shards = {name: Shard(*open_tensors(where / name)) for name in names}
    for tensor, name in index["weight_map"].items():
        if tensor not in shards[name].tensors:
            raise ValueError(f"{str(where / name)!r} must hold {tensor!r}, as its index says")
    return Checkpoint(where, shards, indices[0], index)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index["weight_map"].values()
        if not all(isinstance(name, str) and name and name == Path(name).name for name in names):
            raise ValueError("weight_map must name files beside it")
        if not names:
            raise ValueError("weight_map must name at least one tensor")
        if not isinstance(index.setdefault("metadata", {}), dict):
            raise ValueError("metadata must be an object")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is a broken index: {error!r}") from error
    return index
