"""Batches with labels of rows of text, for the task that a transformers model is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fishfast.fisher.losses import IGNORED
from fishfast.hub.model_folders import LoadedModel, Rows

__all__ = ["make_batches"]

_DEFAULT_MAX_LENGTH = 512


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
        if batch["input_ids"].numel() == 0:  # which models fail on without naming a row
            raise ValueError(
                f"texts must have tokens; row {rows[0]['row number']} has {columns[0][0]!r} in "
                f"{self.texts[0]!r}, and its batch has no other; leave such rows out"
            )
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
        columns = ", ".join(map(repr, rows.columns))
        if given:
            raise ValueError(f"label_column must be one of {columns}; got {name!r}")
        raise ValueError(
            "label_column (--label-column) must be given where no column is called label or "
            f"labels; the dataset has {columns}"
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
