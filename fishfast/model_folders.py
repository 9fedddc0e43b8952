"""Models and data on disk for `estimate_fisher`: what ``fishfast score`` is made of.

Needs transformers and datasets, which are imported when they are used. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fishfast._files import PathLike

__all__ = ["LoadedModel", "Rows", "load_model", "load_rows"]

_READERS = {
    ".jsonl": "from_json",
    ".json": "from_json",
    ".csv": "from_csv",
    ".parquet": "from_parquet",
    ".txt": "from_text",
}


class LoadedModel(NamedTuple):
    """A model that was read from a folder.

    Attributes:
        model: transformers' model, in eval mode.
        tokenizer: transformers' tokenizer from the same folder.
        fresh: names of weights that the folder does not have, drawn at random.
    """

    model: Any
    tokenizer: Any
    fresh: tuple[str, ...]


def load_model(
    folder: PathLike,
    *,
    architecture: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LoadedModel:
    """Load a transformers model and its tokenizer from a folder on this machine.

    Args:
        folder: as ``save_pretrained`` writes it.
        architecture: name of a transformers class; default: the one that the folder's config names.
        dtype: of the weights, such as ``"bfloat16"``; "auto": as they are stored.
        device: where the model goes.
        seed: of weights that the folder does not have, such as a new head.

    Returns:
        Model, tokenizer, and which weights are fresh.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no such folder, or none of a model.
        ValueError: an architecture that transformers does not have.
    """
    transformers = _require("transformers")
    where = Path(folder)
    if not (where / "config.json").is_file():
        raise FileNotFoundError(
            f"model must be a folder with a config.json, as save_pretrained writes it; got "
            f"{os.fspath(folder)!r}"
        )
    local = {"local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(where, **local)
    name = architecture or next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, name, None) if name else None
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise ValueError(
            f"the architecture must be a class of transformers {transformers.__version__}; "
            f"{os.fspath(folder)!r} names {name!r}; give another one"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **local)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = model_class.from_pretrained(
            where, dtype=dtype, output_loading_info=True, **local
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedModel(model.eval().to(device), tokenizer, tuple(sorted(info["missing_keys"])))


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, by number.

    Attributes:
        data: datasets' Dataset.
        path: where it was read.
    """

    data: Any
    path: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self.data[number]
        return {**row, "row number": number}

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.data.column_names)


def load_rows(path: PathLike, *, split: str | None = None) -> Rows:
    """Load a data set from this machine.

    Args:
        path: a folder that ``save_to_disk`` of the library datasets wrote, or a file: .jsonl,
            .json, .csv, .parquet or .txt (a row for each line, column "text").
        split: which part of a folder with several.

    Returns:
        Its rows; those of a file are in memory.

    Raises:
        ImportError: the library datasets is not installed.
        FileNotFoundError: nothing there.
        ValueError: another kind of file, or a split that is needed or not there.
    """
    datasets = _require("datasets")
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"data must be a folder or file; there is no {os.fspath(path)!r}")
    if where.is_dir():
        data = datasets.load_from_disk(str(where))
        if isinstance(data, Mapping):
            if split not in data:
                raise ValueError(
                    f"split must be one of {', '.join(map(repr, data))}; got {split!r}"
                )
            data = data[split]
        elif split is not None:
            raise ValueError(f"{os.fspath(path)!r} has no splits; got split={split!r}")
        return Rows(data, os.fspath(path))
    if split is not None:
        raise ValueError(f"a file has no splits; got split={split!r}")
    if where.suffix not in _READERS:
        raise ValueError(
            f"data must be a folder or a file {', '.join(_READERS)}; got {os.fspath(path)!r}"
        )
    # Not into the user's cache, where it would stay.
    with tempfile.TemporaryDirectory(prefix="fishfast-") as cache:
        read = getattr(datasets.Dataset, _READERS[where.suffix])
        try:
            data = read(str(where), cache_dir=cache, keep_in_memory=True)
        except (datasets.exceptions.DatasetGenerationError, OSError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a readable {where.suffix} file: "
                f"{error.__cause__ or error}"
            ) from error
    return Rows(data, os.fspath(path))


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"scoring from folders needs {package}, which cannot be imported ({error}); "
            'run: pip install "fishfast[score]"'
        ) from error
