"""`apply_to_checkpoint`: base + delta = tuned checkpoint, on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fishfast.delta.delta import Delta, load_delta
from fishfast.files.atomic import PathLike, make_folder, replace_file
from fishfast.files.checkpoint_folders import Checkpoint, open_checkpoint
from fishfast.files.stored_tensors import StoredTensor
from fishfast.files.tensor_writer import Entry, write_tensors
from fishfast.training.base_identity import BaseIdentity, Digest, structure_of

__all__ = ["Applied", "apply_to_checkpoint"]

_PIECE = 1 << 22
# The base's weights in other formats would contradict the tuned ones beside them.
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot",
    ".index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Applied:
    """What `apply_to_checkpoint` wrote.

    Attributes:
        num_selected: weights that the delta set.
        num_tensors: tensors of the new checkpoint.
        nbytes: their bytes.
        created: names that the base does not have and the delta holds whole, such as a new head.
        unknown: names of the base that the delta's model does not have, copied as they are.
        left_out: files of the base's folder that were not copied: its weights in other formats.
    """

    num_selected: int
    num_tensors: int
    nbytes: int
    created: tuple[str, ...]
    unknown: tuple[str, ...]
    left_out: tuple[str, ...]


def apply_to_checkpoint(
    base: PathLike,
    delta: PathLike | Delta,
    out: PathLike,
    *,
    check_base: bool = True,
    progress: bool = False,
) -> Applied:
    """Write the tuned checkpoint of a base checkpoint and a delta, bit-exactly.

    The same as loading the base, ``Delta.apply_`` and saving, but tensors pass through in pieces
    of 4 MiB: the memory is that of the delta and some pieces. The base is read once, hashed while
    it is copied; the result appears under its name when it is whole, right and on the disk, or
    not at all. Tensors of the base that the delta's model does not have are copied; those that
    only the delta has, whole, are added (a new head). Headers keep their metadata.

    Args:
        base: a safetensors file, or a folder, see `open_checkpoint`.
        delta: the delta or its file.
        out: for a file, the new file, which may exist; for a folder, the new folder, which must not
            exist or be empty. It gets the base's other files too (config, tokenizer), but no
            weights in other formats and no hidden files.
        check_base: refuse any but the base that the delta was trained from.
        progress: show a progress bar on stderr.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: a file, or the folder of ``out``, does not exist.
        FileExistsError: ``out`` is a folder with something in it.
        ValueError: another base, or one that the delta does not fit, a damaged file, or ``out`` is
            the base or the delta. Nothing was changed.

    Example:
        >>> import tempfile, torch, fishfast as ff
        >>> from safetensors.torch import load_file, save_file
        >>> folder = tempfile.mkdtemp()
        >>> model = torch.nn.Linear(4, 2)
        >>> save_file(model.state_dict(), f"{folder}/base.safetensors")
        >>> tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
        >>> ff.save_delta(tuned, f"{folder}/delta.safetensors")
        3
        >>> done = ff.apply_to_checkpoint(
        ...     f"{folder}/base.safetensors", f"{folder}/delta.safetensors",
        ...     f"{folder}/tuned.safetensors",
        ... )
        >>> done.num_selected, sorted(load_file(f"{folder}/tuned.safetensors"))
        (3, ['bias', 'weight'])
    """
    checkpoint = open_checkpoint(base)
    _refuse_own_input(out, base, None if isinstance(delta, Delta) else delta)
    found = delta if isinstance(delta, Delta) else load_delta(delta)
    plan = _Plan(checkpoint, found)
    if check_base:
        plan.refuse_other_structure()
    is_folder = checkpoint.path.is_dir()
    left_out: list[str] = []
    with tqdm(
        total=checkpoint.nbytes, unit="B", unit_scale=True, disable=not progress, desc="apply"
    ) as bar:

        def write(target: Path) -> None:
            for number, file_name in enumerate(checkpoint.shards):
                place = target / file_name if is_folder else target
                _write_shard(plan, file_name, place, bar, last=number == len(plan.shards) - 1)
            if check_base:
                plan.refuse_other_content()
            if is_folder:
                _write_index(plan, target)
                left_out.extend(_copy_others(checkpoint.path, target))

        (make_folder if is_folder else replace_file)(out, write)
    created = sum(entry.nbytes for entry in plan.created.values())
    return Applied(
        num_selected=found.num_selected,
        num_tensors=len(checkpoint) + len(plan.created),
        nbytes=checkpoint.nbytes + created,
        created=tuple(plan.created),
        unknown=plan.unknown,
        left_out=tuple(left_out),
    )


def _refuse_own_input(out: PathLike, base: PathLike, delta: PathLike | None) -> None:
    if os.path.exists(out):
        for what, path in (("the base", base), ("the delta", delta)):
            if path is not None and os.path.samefile(out, path):
                raise ValueError(f"out must not be {what} itself; got {os.fspath(out)!r}")
    base_folder = Path(os.path.realpath(base))
    if base_folder.is_dir() and base_folder in Path(os.path.realpath(out)).parents:
        raise ValueError(f"out must not be inside the base's folder; got {os.fspath(out)!r}")


class _Plan:
    """What becomes of each tensor of a checkpoint; refuses one that the delta does not fit."""

    def __init__(self, checkpoint: Checkpoint, delta: Delta) -> None:
        self.checkpoint, self.delta, self.shards = checkpoint, delta, checkpoint.shards
        names = [*delta.mask, *delta.base_others]  # of the delta's model, tied ones once
        first = {name: name for name in names} | (delta.base_ties or {})
        self.first = {name: first[name] for name in checkpoint if name in first}
        self.unknown = tuple(name for name in checkpoint if name not in first)
        self.digests: dict[str, str] = {}
        there = set(self.first.values())
        missing = [name for name in names if name not in there]
        self.created = {name: whole for name in missing if (whole := self._whole(name)) is not None}
        if lacking := [name for name in missing if name not in self.created]:
            raise ValueError(
                f"the delta must fit the base; {_some(lacking)} of its model "
                f"{_are(lacking)} not in {str(checkpoint.path)!r}"
                + (f", which has {_some(self.unknown)} instead" if self.unknown else "")
                + "; weights that were new in training must be in the mask as a whole (keep=)"
            )
        if misfits := list(self._misfits()):
            raise ValueError(f"the delta must fit the base; {'; '.join(misfits[:3])}")

    def _whole(self, name: str) -> Tensor | None:
        """Return a tensor that the delta holds whole."""
        if name in self.delta.buffers:
            return self.delta.buffers[name]
        shape = self.delta.mask.shapes.get(name)
        if shape is None or not len(self.delta.mask[name]) == torch.Size(shape).numel() > 0:
            return None
        return self.delta.values[name].view(shape)

    def _misfits(self) -> Iterator[str]:
        for name, own in self.first.items():
            tensor = self.checkpoint[name]
            expected: tuple[tuple[int, ...], torch.dtype] | None = None
            if (buffer := self.buffer(name)) is not None:
                expected = tuple(buffer.shape), buffer.dtype
            elif own in self.delta.mask:
                values = self.delta.values.get(own)
                dtype = tensor.dtype if values is None else values.dtype
                expected = self.delta.mask.shapes[own], dtype
            if expected is not None and expected != (tuple(tensor.shape), tensor.dtype):
                yield (
                    f"{name!r} is {expected[1]} of shape {expected[0]} in the delta and "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)} in the base"
                )

    def buffer(self, name: str) -> Tensor | None:
        """Return the buffer that the delta puts in a tensor's place."""
        own = self.first.get(name, name)
        return self.delta.buffers.get(name, self.delta.buffers.get(own))

    def refuse_other_structure(self) -> None:
        """Refuse names, shapes and dtypes of another base, before its data is read."""
        tensors: dict[str, Tensor | StoredTensor] = dict(self.created)
        tensors |= {own: self.checkpoint[name] for name, own in self.first.items()}
        layout = {own: (tuple(t.shape), str(t.dtype)) for own, t in tensors.items()}
        self.delta.refuse_other_structure(structure_of(layout))

    def refuse_other_content(self) -> None:
        """Refuse data of another base, after all of it was read."""
        for name, tensor in self.created.items():
            if name in self.delta.mask:  # as a model hashes it: masked whole
                digest = Digest()
                for piece in torch.zeros(tensor.numel(), dtype=tensor.dtype).split(_PIECE):
                    digest.update(piece)
                self.digests[name] = digest.hexdigest()
        self.delta.refuse_other_content(BaseIdentity("", None, self.digests, {}))

    def patched(self, name: str, bar: tqdm) -> Iterator[Tensor]:
        """Yield the new elements of a tensor, and hash the old ones."""
        tensor, own, replaced = self.checkpoint[name], self.first.get(name), self.buffer(name)
        if replaced is not None:
            yield replaced.reshape(-1)
            bar.update(tensor.nbytes)
            return
        indices = self.delta.mask.get(own) if own is not None else None
        masked = indices is not None and len(indices) > 0
        digest, start = Digest(indices if masked else None), 0
        for piece in tensor.pieces():
            if own is not None:
                digest.update(piece)
            if masked:
                assert indices is not None
                bounds = torch.tensor([start, start + len(piece)], dtype=indices.dtype)
                begin, end = torch.searchsorted(indices, bounds).tolist()
                place = indices[begin:end].long() - start
                piece.index_copy_(0, place, self.delta.values[str(own)][begin:end])
            yield piece
            start += len(piece)
            bar.update(piece.nbytes)
        found = digest.hexdigest()
        if own is not None and self.digests.setdefault(own, found) != found:
            raise ValueError(
                f"{own!r} is one weight of several names in the delta's model; the base has "
                f"another one under {name!r}"
            )


def _write_shard(plan: _Plan, file_name: str, place: Path, bar: tqdm, *, last: bool) -> None:
    shard = plan.shards[file_name]
    entries = [
        Entry(name, tensor.dtype, tuple(tensor.shape), plan.patched(name, bar))
        for name, tensor in shard.tensors.items()
    ]
    if last and plan.created:
        entries += [
            Entry(name, tensor.dtype, tuple(tensor.shape), [tensor.reshape(-1)])
            for name, tensor in plan.created.items()
        ]
        entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    write_tensors(place, entries, shard.metadata)


def _write_index(plan: _Plan, target: Path) -> None:
    checkpoint = plan.checkpoint
    if checkpoint.index_name is None:
        return
    index = checkpoint.index
    if plan.created:
        last = list(plan.shards)[-1]
        index["weight_map"] |= dict.fromkeys(plan.created, last)
        created = sum(tensor.nbytes for tensor in plan.created.values())
        index["metadata"]["total_size"] = checkpoint.nbytes + created
    text = json.dumps(index, indent=2) + "\n"
    (target / checkpoint.index_name).write_text(text, encoding="utf-8")


def _copy_others(folder: Path, target: Path) -> list[str]:
    """Copy what is no weights; links are followed, as in a download cache. Return what is not."""
    left_out = []
    for place in sorted(folder.rglob("*")):
        relative = place.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not place.is_file():
            continue
        if (target / relative).exists():
            continue
        if place.name.endswith(_OTHER_WEIGHTS):
            left_out.append(str(relative))
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place, target / relative)
    return left_out


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
