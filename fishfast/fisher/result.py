"""`Fisher`: what scoring gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fishfast.files.atomic import PathLike
from fishfast.fisher.kind import FISHER_TYPES, ScoreKind
from fishfast.fisher.score_files import FACTS, WORK, read_scores, whole_number, write_scores

__all__ = ["Fisher"]

_BETWEEN_ROADS = " / "


class Fisher(Mapping[str, Tensor]):
    """Scores by parameter name, each fp32 and of the parameter's shape.

    Scores of the same parameters add up: ``first + second`` is the Fisher of both calls' samples.

    Args:
        scores: name -> sums over the samples; not copied.
        num_samples: how many samples were summed.
        fallback: name -> reason, for parameters whose gradients were taken one sample at a time.
        num_batches: how many batches the samples came in.
        fisher_type: "empirical", "sampled" or "exact".
        power: 2 for sums of squares, 1 for sums of absolute values.
        roads: name -> how the gradients were caught; default: the reason of the fallback, or
            "batched".
        passes: number of passes by kind: "forward", "backward", "probe" and "fallback".
        seconds: their wall time by the same kinds.

    Attributes:
        num_samples: as given; so are the others, with these defaults.
        num_batches: 0 where it is not known.
        fisher_type: "empirical".
        power: 2.
        fallback: no entries.
        roads: an entry for every parameter.
        passes: an entry for every kind, 0 where it is not known.
        seconds: likewise.

    Raises:
        ValueError: an unknown type or power, a negative number, or an entry for no score.

    Example:
        >>> import torch, fishfast as ff
        >>> first = ff.Fisher({"w": torch.tensor([1.0, 4.0])}, num_samples=2)
        >>> both = first + ff.Fisher({"w": torch.tensor([2.0, 0.0])}, num_samples=1)
        >>> both["w"], both.num_samples
        (tensor([3., 4.]), 3)
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        num_samples: int,
        fallback: Mapping[str, str] | None = None,
        *,
        num_batches: int = 0,
        fisher_type: str = "empirical",
        power: int = 2,
        roads: Mapping[str, str] | None = None,
        passes: Mapping[str, int] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        if fisher_type not in FISHER_TYPES:
            raise ValueError(
                f"fisher_type must be one of {', '.join(map(repr, FISHER_TYPES))}; got "
                f"{fisher_type!r}"
            )
        if power not in (1, 2):
            raise ValueError(f"power must be 2 (squares) or 1 (absolute values); got {power!r}")
        roads, fallback = dict(roads or {}), dict(fallback or {})
        passes, seconds = dict(passes or {}), dict(seconds or {})
        if unknown := {*roads, *fallback} - set(scores):
            raise ValueError(
                f"roads and fallback must name parameters of scores; got {min(unknown)!r}"
            )
        if unknown := {*passes, *seconds} - set(WORK):
            raise ValueError(
                f"passes and seconds must be of {', '.join(map(repr, WORK))}; got {min(unknown)!r}"
            )
        self._scores = dict(scores)
        self.num_samples = whole_number("num_samples", num_samples)
        self.num_batches = whole_number("num_batches", num_batches)
        self.fisher_type, self.power = fisher_type, power
        self.fallback = fallback
        self.roads = {name: roads.get(name, fallback.get(name, "batched")) for name in scores}
        self.passes = {kind: whole_number("passes", passes.get(kind, 0)) for kind in WORK}
        self.seconds = {kind: float(seconds.get(kind, 0.0)) for kind in WORK}

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        weights = sum(score.numel() for score in self.values())
        return (
            f"Fisher({self.fisher_type}, {'squares' if self.power == 2 else 'absolute values'}, "
            f"{weights:,} weights in {len(self)} tensors, {self.num_samples:,} samples, "
            f"{len(self.fallback)} tensors one sample at a time)"
        )

    def __add__(self, other: object) -> Fisher:
        if not isinstance(other, Fisher):
            return NotImplemented
        if difference := self.kind.difference(other.kind, "here", "there"):
            raise ValueError(
                f"scores to be added must be of the same parameters and kind; {difference}"
            )
        return Fisher(
            {name: score + other[name].to(score.device) for name, score in self.items()},
            self.num_samples + other.num_samples,
            _merge(self.fallback, other.fallback),
            num_batches=self.num_batches + other.num_batches,
            fisher_type=self.fisher_type,
            power=self.power,
            roads=_merge(self.roads, other.roads),
            passes={kind: self.passes[kind] + other.passes[kind] for kind in WORK},
            seconds={kind: self.seconds[kind] + other.seconds[kind] for kind in WORK},
        )

    def __radd__(self, other: object) -> Fisher:
        return self if other == 0 else NotImplemented  # sum() begins with 0

    @property
    def kind(self) -> ScoreKind:
        """What scores must have in common with these to be added."""
        return ScoreKind.of(self, self.fisher_type, self.power)

    def to(self, device: torch.device | str | int) -> Fisher:
        """Return the same result with its scores on a device.

        Args:
            device: where to.

        Returns:
            A new result; scores that are there already are shared with this one.
        """
        return Fisher(
            {name: score.to(device) for name, score in self.items()}, **self.facts()
        )  # fmt: skip

    def report(self) -> str:
        """Return a table: each parameter, its mean score of a sample, and how it was caught.

        The lines after it say what that cost: passes over batches, seconds where they were
        measured, and the memory of the scores.
        """
        rows = [
            (name, tuple(score.shape), f"{_mean(score) / max(1, self.num_samples):.4g}",
             self.roads[name])
            for name, score in self.items()
        ]  # fmt: skip
        headers = ("parameter", "shape", "mean score per sample", "road")
        batched = ("forward", "backward", "probe")
        counts = [f"{self.passes[kind]:,} {kind}" for kind in batched]
        lines = [
            tabulate(rows, headers=headers, disable_numparse=True),
            f"batched: {len(self) - len(self.fallback)} tensors, {', '.join(counts)} passes"
            + self._share(*batched),
        ]
        if self.fallback:
            lines.append(
                f"fallback: {len(self.fallback)} tensors, {self.passes['fallback']:,} extra "
                f"backward passes{self._share('fallback')}"
            )
        return "\n".join([*lines, self._memory()])

    def _memory(self) -> str:
        sizes: dict[str, int] = {}
        for score in self.values():
            place = str(score.device)
            sizes[place] = sizes.get(place, 0) + score.numel() * score.element_size()
        parts = [f"{_in_bytes(size)} of fp32 on {place}" for place, size in sizes.items()]
        return f"scores: {', '.join(parts) or 'none'}"

    def _share(self, *kinds: str) -> str:
        total, part = sum(self.seconds.values()), sum(self.seconds[kind] for kind in kinds)
        return f", {part:.1f} s of {total:.1f} s ({part / total:.0%})" if total > 0 else ""

    def save(self, path: PathLike) -> None:
        """Write scores and attributes to a safetensors file, atomically.

        Equal results give the same bytes, whatever ``seconds`` is: it is not written.

        Args:
            path: target file; its folder must exist.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: scores that are not fp32, finite and at least 0.
        """
        write_scores(path, self, {**self.facts(), "seconds": dict.fromkeys(WORK, 0.0)})

    @classmethod
    def load(cls, path: PathLike) -> Fisher:
        """Read scores that `save` wrote.

        Args:
            path: the file.

        Returns:
            The scores, on the CPU, with every attribute; ``seconds`` is 0 unless the file is that
            of a ``resume_path``, whose parts add up.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, a newer version, scores that are not fp32, finite and
                at least 0, attributes that are missing or wrong, or a damaged file.
        """
        scores, facts, _ = read_scores(path)
        return cls(scores, **facts)

    def facts(self) -> dict[str, Any]:
        """Return everything but the scores, by the names that ``__init__`` has for it."""
        return {name: getattr(self, name) for name in FACTS}


def _in_bytes(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _mean(score: Tensor) -> float:
    return float(score.mean()) if score.numel() else 0.0


def _merge(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Name every road that a parameter took, in one call or another."""
    merged = dict(first)
    for name, text in second.items():
        roads = [*merged.get(name, text).split(_BETWEEN_ROADS), *text.split(_BETWEEN_ROADS)]
        merged[name] = _BETWEEN_ROADS.join(dict.fromkeys(roads))
    return merged
