"""`FishConfig`: how a mask is made, as a small JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fishfast.files.atomic import PathLike, write_text_atomically
from fishfast.files.strict_json import names_once

__all__ = ["FishConfig"]

_FORMAT, _VERSION = "fishfast.config", 1
_DEFAULT_DENSITY = 0.005
_CHOICES = {
    "fisher_type": ("empirical", "exact", "sampled"),
    "head": (None, "softmax", "sigmoid", "gaussian", "tokens"),
    "power": (1, 2),
    "scope": ("global", "layer"),
}


@dataclass(frozen=True)
class FishConfig:
    """How `get_fish_model` scores a model and makes its mask.

    Args:
        density: k as a share of the scored weights, in (0, 1]; default 0.005 where ``k`` is not
            given either.
        k: number of trained weights, instead of ``density``.
        keep: parameters that are always trained, and charged to k: paths or globs.
        exclude: parameters that are never trained.
        scope: ``"global"`` or ``"layer"``, as for `top_k_mask`.
        num_samples: how many samples are scored; default: all that the batches have.
        fisher_type: ``"empirical"``, ``"exact"`` or ``"sampled"``, as for `estimate_fisher`.
        head: what the model's outputs are, for exact and sampled.
        num_label_samples: draws for each sample; sampled only.
        power: 2 for squares, 1 for absolute values.
        seed: of the draws.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, or both ``density`` and ``k``.

    Example:
        >>> import fishfast as ff
        >>> ff.FishConfig(keep="classifier", num_samples=256).density
        0.005
    """

    density: float | None = None
    k: int | None = None
    keep: str | Iterable[str] = ()
    exclude: str | Iterable[str] = ()
    scope: str = "global"
    num_samples: int | None = None
    fisher_type: str = "empirical"
    head: str | None = None
    num_label_samples: int = 1
    power: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.density is not None and self.k is not None:
            raise ValueError(
                f"give density or k, not both; got density={self.density!r} and k={self.k!r}"
            )
        if self.density is None and self.k is None:
            object.__setattr__(self, "density", _DEFAULT_DENSITY)
        for name in ("keep", "exclude"):
            object.__setattr__(self, name, _entries(name, getattr(self, name)))
        if self.density is not None:
            _refuse_other_type("density", self.density, (float, int), "a number")
            if not 0 < self.density <= 1:
                raise ValueError(f"density must be in (0, 1]; got {self.density!r}")
        least = {"k": 1, "num_samples": 1, "num_label_samples": 1, "seed": 0, "power": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name in ("k", "num_samples"):
                continue
            _refuse_other_type(name, value, (int,), "a whole number")
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}; got {value!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")

    def to_json_file(self, path: PathLike) -> None:
        """Write the config, atomically.

        Args:
            path: target file; its folder must exist.
        """
        contents = {"format": _FORMAT, "format_version": _VERSION, **asdict(self)}
        write_text_atomically(path, json.dumps(contents, indent=2) + "\n")

    @classmethod
    def from_json_file(cls, path: PathLike) -> FishConfig:
        """Read a config that `to_json_file` wrote.

        Args:
            path: the file.

        Returns:
            The config.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, a newer version, a field that is unknown or there twice,
                or a value that a config cannot have.
        """
        source = repr(os.fspath(path))
        try:
            text = Path(path).read_text(encoding="utf-8")
            contents = json.loads(
                text,
                object_pairs_hook=names_once(
                    lambda name: f"{source} has the field {name!r} twice; delete one of them"
                ),
            )
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source} is not a JSON file: {error}") from error
        if not isinstance(contents, dict) or contents.pop("format", None) != _FORMAT:
            raise ValueError(f'{source} must be a {_FORMAT} file, with "format": "{_FORMAT}"')
        if (version := contents.pop("format_version", None)) != _VERSION or version is True:
            raise ValueError(
                f"{source} has format_version {version!r}; this fishfast reads version {_VERSION}; "
                "upgrade fishfast or save it again"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(contents) - known):
            raise ValueError(
                f"{source} has the unknown field {unknown[0]!r}; known: {sorted(known)}"
            )
        try:
            return cls(**contents)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error


def _entries(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) else None
    if found is None or not all(isinstance(entry, str) for entry in found):
        raise TypeError(f"{name} must be a path, a glob or several of them; got {value!r}")
    return found


def _refuse_other_type(name: str, value: object, types: tuple[type, ...], what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"{name} must be {what}; got {value!r}")
