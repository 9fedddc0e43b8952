"""`diff_checkpoints`: tuned - base = delta, on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from fishfast.delta.delta import Delta
from fishfast.delta.file import refuse_non_finite
from fishfast.files.atomic import PathLike
from fishfast.files.checkpoint_folders import Checkpoint, open_checkpoint
from fishfast.files.stored_tensors import StoredTensor
from fishfast.mask.names import match_names, natural
from fishfast.mask.sparse_mask import SparseMask, index_dtype
from fishfast.training.base_identity import BaseIdentity, Digest, structure_of

__all__ = ["diff_checkpoints"]

# What a delta can hold entry by entry, and integers of the same width, which compare as bits.
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")


def diff_checkpoints(
    base: PathLike,
    tuned: PathLike,
    *,
    buffers: str | Iterable[str] = (),
    allow_large: bool = False,
    progress: bool = False,
) -> Delta:
    """Find what changed between two checkpoints, bit by bit, as a delta.

    An entry has changed when a bit of it has: -0.0 and 0.0 differ, two equal NaN do not. Tensors
    pass through in pieces of 4 MiB: the memory is some pieces and the delta's entries. Applied to
    the base, in a model or with `apply_to_checkpoint`, the delta gives ``tuned`` bit for bit.

    A checkpoint does not say what is a buffer, which a delta replaces whole and a model keeps
    apart from its parameters. Taken for buffers: tensors of integers, bool or 8-bit floats,
    BatchNorm's ``running_mean``, ``running_var`` and ``num_batches_tracked``, and what ``buffers``
    names. For checkpoints as files the distinction does not matter.

    Args:
        base: a safetensors file or a folder, see `open_checkpoint`.
        tuned: likewise; with the same names, shapes and dtypes.
        buffers: names of further buffers: paths or globs.
        allow_large: allow a delta that is larger than ``tuned`` itself.
        progress: show a progress bar on stderr.

    Returns:
        The delta, on the CPU; ``save`` writes it. Its mask has every floating tensor that is no
        buffer. Which names are tied is not known.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: names, shapes or dtypes that differ, a changed value that is not finite, an
            entry of ``buffers`` that matches nothing, a delta larger than ``tuned``, or a damaged
            file.

    Example:
        >>> import tempfile, torch, fishfast as ff
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.tensor([1.0, 2, 3, 4, 0])}, f"{folder}/base.safetensors")
        >>> save_file({"w": torch.tensor([1.0, 2, 3, 5, -0.0])}, f"{folder}/tuned.safetensors")
        >>> delta = ff.diff_checkpoints(f"{folder}/base.safetensors", f"{folder}/tuned.safetensors")
        >>> delta.mask["w"], delta.values["w"]
        (tensor([3, 4], dtype=torch.int32), tensor([5., -0.]))
        >>> delta.save(f"{folder}/delta.safetensors")
    """
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    _refuse_other_layout(before, after)
    names = sorted(before, key=natural)
    named = set(match_names(buffers, names, "buffers")) if buffers else set()
    as_buffers = {
        name
        for name in names
        if name in named
        or before[name].dtype not in _BITS
        or name.rpartition(".")[2] in _BATCH_NORM
    }
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    size, source = 0, repr(str(after.path))
    with tqdm(
        total=before.nbytes, unit="B", unit_scale=True, disable=not progress, desc="diff"
    ) as bar:
        for name in names:
            old, new = before[name], after[name]
            if name in as_buffers:
                same, digests[name] = _compare(old, new, bar)
                if not same:
                    replaced[name] = new.read()
                    refuse_non_finite(name, replaced[name], source)
                    size += new.nbytes
                continue
            indices[name], changed, digests[name] = _changes(old, new, bar)
            refuse_non_finite(name, changed, source)
            if len(changed):
                values[name] = changed
                size += changed.nbytes + indices[name].nbytes
            if size > after.nbytes and not allow_large:
                raise ValueError(
                    f"the delta must be smaller than {source}, which has "
                    f"{after.nbytes:,} bytes; it has more already at {name!r}: keep the checkpoint "
                    "itself, or allow it (allow_large=True, --allow-large)"
                )
    mask = SparseMask(indices, {name: tuple(before[name].shape) for name in indices})
    layout = {name: (tuple(t.shape), str(t.dtype)) for name, t in before.items()}
    identity = BaseIdentity(structure_of(layout), None, digests, {})
    return Delta(
        mask, values, replaced, identity.structure, identity.content(replaced), None,
        sorted(as_buffers),
    )  # fmt: skip


def _changes(old: StoredTensor, new: StoredTensor, bar: tqdm) -> tuple[Tensor, Tensor, str]:
    """Return where two tensors differ, the new values, and the hash of the rest of the old one."""
    places, values, digest, start = [], [], Digest(), 0
    for was, now in _pieces(old, new, bar):
        bits = _BITS[old.dtype]
        changed = (was.view(bits) != now.view(bits)).nonzero().flatten()
        places.append((changed + start).to(index_dtype(old.numel())))
        values.append(now[changed])
        digest.update(was.index_fill_(0, changed, 0) if len(changed) else was)
        start += len(was)
    if not places:
        return (
            torch.empty(0, dtype=torch.int32),
            torch.empty(0, dtype=old.dtype),
            Digest().hexdigest(),
        )
    return torch.cat(places), torch.cat(values), digest.hexdigest()


def _compare(old: StoredTensor, new: StoredTensor, bar: tqdm) -> tuple[bool, str]:
    """Return whether two tensors are equal bit for bit, and the hash of the old one."""
    same, digest = True, Digest()
    for was, now in _pieces(old, new, bar):
        same = same and torch.equal(was.view(torch.uint8), now.view(torch.uint8))
        digest.update(was)
    return same, digest.hexdigest()


def _pieces(old: StoredTensor, new: StoredTensor, bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
    for was, now in zip(old.pieces(), new.pieces(), strict=True):
        yield was, now
        bar.update(now.nbytes)


def _refuse_other_layout(before: Checkpoint, after: Checkpoint) -> None:
    problems = []
    for one, other in ((before, after), (after, before)):
        if only := sorted(set(one) - set(other), key=natural):
            more = f" and {len(only) - 3:,} more" if len(only) > 3 else ""
            problems.append(f"only {str(one.path)!r} has {', '.join(map(repr, only[:3]))}{more}")
    for name in sorted(set(before) & set(after), key=natural):
        was, now = before[name], after[name]
        if (was.shape, was.dtype) != (now.shape, now.dtype):
            problems.append(
                f"{name!r} is {was.dtype} of shape {tuple(was.shape)} in the base and {now.dtype} "
                f"of shape {tuple(now.shape)} in the other"
            )
    if problems:
        raise ValueError(
            f"checkpoints must have the same names, shapes and dtypes; {'; '.join(problems[:3])}"
        )
