"""Models and data on disk for `estimate_fisher`: what ``fishfast score`` is made of.

Needs transformers and datasets, which are imported when they are used. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fishfast.files.atomic import PathLike

__all__ = ["LoadedModel", "Rows", "load_model", "load_rows"]

_READERS = {
    ".jsonl": "from_json",
    ".json": "from_json",
    ".csv": "from_csv",
    ".parquet": "from_parquet",
    ".txt": "from_text",
}


# Of any tokenizer; others go by names of their own.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")


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
        FileNotFoundError: no such folder, or none of a model with its tokenizer.
        ValueError: an architecture that transformers does not have, a device that torch does not
            have here, weights that do not fit the config, or files that are damaged.
    """
    transformers = _require("transformers")
    where = Path(folder)
    if not (where / "config.json").is_file():
        raise FileNotFoundError(
            f"model must be a folder with a config.json, as save_pretrained writes it; got "
            f"{os.fspath(folder)!r}"
        )
    _refuse_other_device(device)
    local = {"local_files_only": True}
    source = f"model {os.fspath(folder)!r}"
    with _reading(f"the config of {source} cannot be read"):
        config = transformers.AutoConfig.from_pretrained(where, **local)
    name = architecture or next(iter(config.architectures or ()), None)
    model_class: Any = getattr(transformers, name, None) if name else None
    is_model = isinstance(model_class, type) and issubclass(
        model_class, transformers.PreTrainedModel
    )
    if not is_model and not (model_class and str(name).startswith("AutoModel")):
        raise ValueError(
            f"the architecture must be a model of transformers {transformers.__version__}; "
            f"{os.fspath(folder)!r} names {name!r}; give another one"
        )
    with _reading(f"the tokenizer of {source} cannot be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **local)
    _refuse_no_vocabulary(tokenizer, where)
    with _reading(f"the weights of {source} cannot be read"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = model_class.from_pretrained(
            where, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **local
        )
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"the weights of {source} must fit its config; {name!r} has shape {tuple(stored)}, and "
            f"the config asks for {tuple(expected)}"
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
        ValueError: another kind of file, one that is damaged or has no rows, or a split that is
            needed or not there.
    """
    datasets = _require("datasets")
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"data must be a folder or file; there is no {os.fspath(path)!r}")
    if where.is_dir():
        with _reading(
            f"data must be a folder as save_to_disk writes it, with rows in it; {os.fspath(path)!r}"
            " cannot be read"
        ):
            data = datasets.load_from_disk(str(where))
        if isinstance(data, Mapping):
            if split not in data:
                raise ValueError(
                    f"split must be one of {', '.join(map(repr, data))}; got {split!r}"
                )
            data = data[split]
        elif split is not None:
            raise ValueError(f"{os.fspath(path)!r} has no splits; got split={split!r}")
        return _rows(data, path)
    if split is not None:
        raise ValueError(f"a file has no splits; got split={split!r}")
    if where.suffix not in _READERS:
        raise ValueError(
            f"data must be a folder or a file {', '.join(_READERS)}; got {os.fspath(path)!r}"
        )
    if where.stat().st_size == 0:
        _refuse_no_rows(path)
    # Not into the user's cache, where it would stay.
    with (
        tempfile.TemporaryDirectory(prefix="fishfast-") as cache,
        _reading(
            f"data must be a {where.suffix} file with rows in it; {os.fspath(path)!r} cannot be "
            "read"
        ),
    ):
        read = getattr(datasets.Dataset, _READERS[where.suffix])
        data = read(str(where), cache_dir=cache, keep_in_memory=True)
    return _rows(data, path)


def _rows(data: Any, path: PathLike) -> Rows:
    if len(data) == 0:
        _refuse_no_rows(path)
    return Rows(data, os.fspath(path))


def _refuse_no_rows(path: PathLike) -> NoReturn:
    raise ValueError(f"data must have at least one row; {os.fspath(path)!r} has none")


@contextlib.contextmanager
def _reading(problem: str) -> Iterator[None]:
    """Name what cannot be read.

    The libraries raise anything where a file is bad, KeyError and StopIteration too, and seldom
    with its name.

    Raises:
        ImportError: the library's own, which says what to install.
        ValueError: in the place of everything else.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        kind = "" if isinstance(cause, (ValueError, OSError)) else f"{type(cause).__name__}: "
        raise ValueError(f"{problem}: {kind}{cause}") from error


def _refuse_other_device(device: torch.device | str) -> None:
    try:
        torch.empty(1, device=device).cpu()  # "meta" has nothing to give
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that torch has here, such as 'cpu'; got {str(device)!r}: {error}"
        ) from error


def _refuse_no_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer without its files: transformers makes one that knows no word."""
    names = [*getattr(tokenizer, "vocab_files_names", {}).values()]
    if names and not any((folder / name).is_file() for name in (*names, *_VOCABULARIES)):
        raise FileNotFoundError(
            f"model {os.fspath(folder)!r} must have its tokenizer beside it, as the tokenizer's "
            f"save_pretrained writes it; there is no {' or '.join(names)}"
        )


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"scoring from folders needs {package}, which cannot be imported ({error}); "
            'run: pip install "fishfast[score]"'
        ) from error
