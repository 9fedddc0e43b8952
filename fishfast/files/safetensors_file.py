"""Our safetensors files: equal contents are equal bytes, read with suspicion; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fishfast.files.atomic import PathLike, refuse_no_file, replace_file
from fishfast.files.stored_tensors import DTYPES
from fishfast.files.strict_json import names_once
from fishfast.files.tensor_writer import Entry, raw_bytes, write_tensors

__all__ = [
    "Checksum",
    "check_format",
    "read_checked",
    "refuse_damaged",
    "said_format",
    "write_atomically",
]

_ORDER = list(DTYPES.values())


def write_atomically(
    path: PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file so that a kill at any moment leaves the old file or the new one.

    The same tensors and metadata give the same bytes. Temporary file in the same folder, fsync,
    rename over the target, fsync of the folder. A link is followed, and an existing file's mode is
    kept. A kill may leave the temporary file behind.

    Args:
        path: target; its folder must exist.
        tensors: any devices; written contiguous.
        metadata: the header's string entries; ``sha256`` over all tensors is added.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the disk is full, or refuses otherwise.
        ValueError: the target exists and is no regular file.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {**metadata, "sha256": _sha256(ready)}
    order = sorted(ready.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape), [tensor]) for name, tensor in order]
    replace_file(path, lambda temporary: write_tensors(temporary, entries, described))


class Checksum:
    """SHA-256 of names and bytes, so that one flipped bit or a missing tensor is noticed.

    Tensors come in the order of their names, each one first by `begin`, then by its data.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def begin(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> None:
        """Take the next tensor's name, dtype and shape."""
        self._sha.update(json.dumps([name, str(dtype), list(shape)]).encode())

    def update(self, piece: Tensor) -> None:
        """Take the next elements of that tensor, on the CPU."""
        self._sha.update(raw_bytes(piece))

    def hexdigest(self) -> str:
        """Return the hash of what came so far."""
        return self._sha.hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    checksum = Checksum()
    for name, tensor in sorted(tensors.items()):
        checksum.begin(name, tensor.dtype, tensor.shape)
        checksum.update(tensor)
    return checksum.hexdigest()


def read_checked(
    path: PathLike, kind: str, version: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that `write_atomically` wrote, or refuse it.

    Args:
        path: the file.
        kind: what its ``format`` entry must be, such as ``"fishfast.mask"``.
        version: the newest ``format_version`` that is understood.

    Returns:
        The tensors and the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, another format, a newer version, a name that occurs
            twice in its header, or a damaged file: before anyone judges what damage left.
    """
    refuse_no_file(path)
    _refuse_duplicate_names(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            check_format(path, metadata, kind, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a whole safetensors file: {error}") from error
    refuse_damaged(path, metadata, _sha256(tensors))
    return tensors, metadata


def check_format(path: PathLike, metadata: Mapping[str, str], kind: str, version: int) -> None:
    """Refuse another kind of file, or another version.

    Args:
        path: the file, for the message.
        metadata: its metadata.
        kind: what its ``format`` must be.
        version: what its ``format_version`` must be.

    Raises:
        ValueError: it is not.
    """
    if metadata.get("format") != kind:
        raise ValueError(f"{os.fspath(path)!r} must be a {kind} file; {said_format(metadata)}")
    if metadata.get("format_version") != str(version):
        raise ValueError(
            f"{os.fspath(path)!r} has format_version {metadata.get('format_version')!r}; "
            f"this fishfast reads version {version}; upgrade fishfast or save it again"
        )


def said_format(metadata: Mapping[str, str]) -> str:
    """Return what a file says that it is, for a message.

    Args:
        metadata: its metadata.
    """
    found = metadata.get("format")
    if found in (None, "pt"):
        return "it is like a model's checkpoint"
    return f"its format is {found!r}"


def refuse_damaged(path: PathLike, metadata: Mapping[str, str], found: str) -> None:
    """Refuse a file whose tensors are not, bit for bit, those that were written.

    Args:
        path: the file, for the message.
        metadata: its metadata.
        found: the checksum of its tensors.

    Raises:
        ValueError: a checksum that is missing or does not match.
    """
    if metadata.get("sha256") != found:
        raise ValueError(f"{os.fspath(path)!r} does not match its checksum: the file is damaged")


def _refuse_duplicate_names(path: Path) -> None:
    """Safetensors accepts a header that names a tensor twice and keeps the last one."""
    hook = names_once(lambda name: f"{os.fspath(path)!r} names {name!r} twice in its header")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return  # not a safetensors file; safe_open says so
        try:
            json.loads(file.read(length), object_pairs_hook=hook)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return  # likewise
