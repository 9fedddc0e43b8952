"""Models and data on disk for `estimate_fisher`: what ``fishfast score`` is made of.

Needs transformers and datasets, which are imported when they are used. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fishfast._files import PathLike
from fishfast.fisher.losses import IGNORED

__all__ = ["LoadedModel", "Rows", "load_model", "load_rows", "make_batches"]

_DEFAULT_MAX_LENGTH = 512
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


def make_batches(
    loaded: LoadedModel,
    rows: Rows,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> DataLoader[Any]:
    """Make batches with ``labels`` of rows of text, for the model's own task.

    Sequence classification takes one or two texts and a label: a number, or a name of the config's
    ``label2id``. Causal language models take one text, each of whose tokens is a label.
    Encoder-decoders take one text and another one as the label.

    Args:
        loaded: model and tokenizer.
        rows: the data.
        text_columns: one or two; default: the only column of strings that is no label.
        label_column: default: ``label`` or ``labels``.
        batch_size: rows in a batch.
        max_length: tokens after which a text is cut; default: 512 or what the model takes.
        shuffle: in an order drawn from the seed; data sets are often sorted by label.
        seed: of the order.

    Returns:
        The batches; the same arguments give the same ones again.

    Raises:
        ValueError: a task that is none of these, columns that are missing or must be named, or a
            label that the model does not know (when its batch is made).
    """
    task = _task(loaded.model)
    labels = None if task == "tokens" else _label_column(rows, label_column)
    texts = _text_columns(rows, text_columns, labels)
    most = {"classes": 2}.get(task, 1)
    if len(texts) > most:
        raise ValueError(
            f"text_columns must be at most {most} for {type(loaded.model).__name__}; got "
            f"{', '.join(texts)}"
        )
    limit = min(max_length or _DEFAULT_MAX_LENGTH, loaded.tokenizer.model_max_length)
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if max_length is None and positions:
        limit = min(limit, positions)
    collate = _Collate(loaded, task, texts, labels, limit)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        rows, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate  # type: ignore[arg-type]
    )  # fmt: skip


class _Collate:
    """Makes a batch of rows."""

    def __init__(
        self, loaded: LoadedModel, task: str, texts: list[str], labels: str | None, limit: int
    ) -> None:
        self.tokenizer, self.config = loaded.tokenizer, loaded.model.config
        self.task, self.texts, self.labels, self.limit = task, texts, labels, limit

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = [[_text(row, name) for row in rows] for name in self.texts]
        batch = dict(self._tokens(*columns))
        if self.task == "tokens":
            counted = batch["attention_mask"].bool()
            batch["labels"] = batch["input_ids"].masked_fill(~counted, IGNORED)
        elif self.task == "text":
            targets = [_text(row, str(self.labels)) for row in rows]
            tokens = self._tokens(text_target=targets)
            counted = tokens["attention_mask"].bool()
            batch["labels"] = tokens["input_ids"].masked_fill(~counted, IGNORED)
        else:
            batch["labels"] = torch.tensor([self._label(row) for row in rows])
        return batch

    def _tokens(self, *columns: list[str], **options: Any) -> Mapping[str, Tensor]:
        tokens: Mapping[str, Tensor] = self.tokenizer(
            *columns, truncation=True, max_length=self.limit, padding=True,
            return_tensors="pt", **options,
        )  # fmt: skip
        return tokens

    def _label(self, row: Mapping[str, Any]) -> int | float:
        label, count = row[str(self.labels)], self.config.num_labels
        if self.config.problem_type == "regression" or count == 1:
            if isinstance(label, (int, float)) and not isinstance(label, bool):
                return float(label)
        elif isinstance(label, str) and label in self.config.label2id:
            return int(self.config.label2id[label])
        elif isinstance(label, int) and 0 <= label < count:
            return int(label)
        known = ", ".join(map(repr, list(self.config.label2id)[:5]))
        raise ValueError(
            f"labels must be numbers from 0 to {count - 1} or names of the model's config "
            f"({known}); row {row['row number']} has {label!r} in {self.labels!r}"
        )


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(
            f"texts must be strings; row {row['row number']} has {row[column]!r} in {column!r}"
        )
    return str(row[column])


def _task(model: nn.Module) -> str:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "classes"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "tokens"
    if name.endswith("ForConditionalGeneration"):
        return "text"
    raise ValueError(
        "the model must be one for sequence classification, a causal language model or an "
        f"encoder-decoder of texts; got {name}; name another architecture, or call "
        "fishfast.estimate_fisher with batches of your own"
    )


def _label_column(rows: Rows, given: str | None) -> str:
    name = given or next((n for n in ("label", "labels") if n in rows.columns), None)
    if name not in rows.columns:
        raise ValueError(
            f"label_column must be one of {', '.join(map(repr, rows.columns))}; got {name!r}"
        )
    return str(name)


def _text_columns(rows: Rows, given: Sequence[str], labels: str | None) -> list[str]:
    if missing := [name for name in given if name not in rows.columns]:
        raise ValueError(
            f"text_columns must be of {', '.join(map(repr, rows.columns))}; got {missing[0]!r}"
        )
    if given:
        return list(given)
    features = rows.data.features
    strings = [
        name
        for name in rows.columns
        if name != labels and getattr(features[name], "dtype", "") in ("string", "large_string")
    ]
    if len(strings) != 1:
        raise ValueError(
            "text_columns must be given unless one column only has strings; those with strings: "
            f"{', '.join(map(repr, strings)) or 'none'}"
        )
    return strings


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"scoring from folders needs {package}, which cannot be imported ({error}); "
            'run: pip install "fishfast[score]"'
        ) from error
