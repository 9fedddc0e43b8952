"""Files of scores: safetensors, with what is known of the scores in the header."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishfast.files.atomic import PathLike
from fishfast.files.safetensors_file import (
    Checksum,
    check_format,
    read_checked,
    refuse_damaged,
    write_atomically,
)
from fishfast.files.stored_tensors import open_tensors
from fishfast.fisher.kind import FISHER_TYPES

__all__ = [
    "FACTS",
    "WORK",
    "ScoreFacts",
    "describe_scores",
    "read_scores",
    "whole_number",
    "write_scores",
]

_FORMAT, _VERSION = "fishfast.fisher", 1
_CHECKSUM = "header_sha256"
# The kinds of passes over a batch that are counted and timed.
WORK = ("forward", "backward", "probe", "fallback")


def write_scores(
    path: PathLike,
    scores: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write scores atomically.

    Args:
        path: target file; its folder must exist.
        scores: name -> fp32 scores, on any devices.
        facts: a value for each name of `FACTS`.
        extra: further entries of the header, under names of their own.

    Raises:
        ValueError: scores that are not fp32, finite and at least 0.
    """
    for name, score in scores.items():
        _check_score(name, score, "the scores to be saved")
    header = {name: json.dumps(facts[name]) for name in FACTS}
    header |= {"format": _FORMAT, "format_version": str(_VERSION), **(extra or {})}
    write_atomically(path, scores, {**header, _CHECKSUM: _header_checksum(header)})


def read_scores(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Read what `write_scores` wrote, in its order.

    Args:
        path: the file.

    Returns:
        The scores, on the CPU, the facts, and all of the header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a newer version, scores that are not fp32, finite and at
            least 0, facts that are missing or wrong, or a damaged file.
    """
    tensors, header = read_checked(path, _FORMAT, _VERSION)
    source = repr(os.fspath(path))
    _check_header(source, header)
    facts = _read_facts(source, tensors, header)
    for name, score in tensors.items():
        _check_score(name, score, source)
    # The order in which they were scored, which decides ties; safetensors has one of its own.
    return {name: tensors[name] for name in facts["roads"]}, facts, header


def describe_scores(path: PathLike) -> tuple[dict[str, ScoreFacts], dict[str, Any]]:
    """Read what `write_scores` wrote, piece by piece, for what can be said of it.

    Args:
        path: the file.

    Returns:
        Name -> facts of its scores, in the order in which they were scored, and the other facts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_scores`.
    """
    tensors, header = open_tensors(path)
    check_format(path, header, _FORMAT, _VERSION)
    source = repr(os.fspath(path))
    _check_header(source, header)
    facts = _read_facts(source, tensors, header)
    found, checksum, problem = {}, Checksum(), ""
    for name, tensor in sorted(tensors.items()):
        checksum.begin(name, tensor.dtype, tensor.shape)
        total, zeros = 0.0, 0
        for piece in tensor.pieces():
            checksum.update(piece)
            if problem := problem or _problem_of(name, piece):
                continue  # damage, perhaps, as the whole checksum tells
            total += float(piece.sum(dtype=torch.float64))
            zeros += len(piece) - int(piece.count_nonzero())
        found[name] = ScoreFacts(tuple(tensor.shape), tensor.numel(), total, zeros)
    refuse_damaged(path, header, checksum.hexdigest())
    if problem:
        raise ValueError(f"{source}: {problem}")
    return {name: found[name] for name in facts["roads"]}, facts


class ScoreFacts(NamedTuple):
    """What is said of a parameter's scores.

    Attributes:
        shape: the parameter's.
        num_params: number of its scores.
        total: their sum.
        num_zero: how many of them are 0.
    """

    shape: tuple[int, ...]
    num_params: int
    total: float
    num_zero: int


def _read_facts(source: str, tensors: Collection[str], header: Mapping[str, str]) -> dict[str, Any]:
    try:
        facts = {name: read(json.loads(header[name])) for name, read in FACTS.items()}
        if unmatched := set(facts["roads"]) ^ set(tensors):
            raise ValueError(f"roads and scores must match; {min(unmatched)!r} is in one only")
        if unknown := set(facts["fallback"]) - set(tensors):
            raise ValueError(f"fallback names {min(unknown)!r}, which has no scores")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} has a broken header: {error!r}") from error
    return facts


def _check_header(source: str, header: Mapping[str, str]) -> None:
    if header.get(_CHECKSUM) != _header_checksum(header):
        raise ValueError(f"{source}: the header does not match its checksum: the file is damaged")


def _header_checksum(header: Mapping[str, str]) -> str:
    """Hash what the checksum over the tensors does not: the facts are results too."""
    entries = {name: text for name, text in header.items() if name not in ("sha256", _CHECKSUM)}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def whole_number(name: str, value: Any) -> int:
    """Return a number >= 0 as an int.

    Args:
        name: what it is, for the message.
        value: an integer of any type.

    Returns:
        The number.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
        raise ValueError(f"{name} must be a whole number >= 0; got {value!r}")
    return operator.index(value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e18:
        raise ValueError(f"seconds must be numbers >= 0; got {value!r}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text; got {value!r}")
    return value


def _one_of(*allowed: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"expected one of {allowed}; got {value!r}")
        return allowed[allowed.index(value)]  # 2, not 2.0

    return read


def _entries(read: Callable[[Any], Any], names: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    def read_all(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or (names and set(value) != set(names)):
            raise ValueError(f"expected entries by {names or 'name'}; got {value!r}")
        return {name: read(entry) for name, entry in value.items()}

    return read_all


# What is known of scores, by name, and how each is read from a file, which may say anything.
FACTS: dict[str, Callable[[Any], Any]] = {
    "num_samples": lambda value: whole_number("num_samples", value),
    "num_batches": lambda value: whole_number("num_batches", value),
    "fisher_type": _one_of(*FISHER_TYPES),
    "power": _one_of(1, 2),
    "fallback": _entries(_text),
    "roads": _entries(_text),
    "passes": _entries(lambda value: whole_number("passes", value), WORK),
    "seconds": _entries(_seconds, WORK),
}


def _check_score(name: str, score: Tensor, source: str) -> None:
    if problem := _problem_of(name, score):
        raise ValueError(f"{source}: {problem}")


def _problem_of(name: str, score: Tensor) -> str:
    """Say what is wrong with scores; empty if nothing is."""
    if score.dtype != torch.float32:
        return f"scores must be torch.float32; {name!r} is {score.dtype}"
    if not torch.isfinite(score).all():
        return f"scores must be finite; {name!r} has NaN or infinity"
    if (score < 0).any():
        return f"scores must be at least 0; {name!r} has {float(score.min())}"
    return ""
