"""``fishfast score``: scores of a model and data on disk."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import fishfast as ff
from fishfast.cli.common import FILE, PATH, check_output, clean_errors
from fishfast.hub.model_folders import LoadedModel, load_model, load_rows
from fishfast.hub.text_batches import make_batches
from fishfast.mask.budget import Totals, budget
from fishfast.mask.names import split_by_rule

__all__ = ["score"]

# The first character keeps click from wrapping it.
_EXAMPLE = """\b
Example:
  fishfast score bert/ train.jsonl -o fisher.safetensors --num-samples 256 \\
      --mask mask.safetensors --density 0.005 --keep classifier"""
_COUNT = click.IntRange(min=1)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@click.command(short_help="Score every weight of a model on data.", epilog=_EXAMPLE)
@click.argument("model", type=PATH)
@click.argument("data", type=PATH)
@click.option("-o", "--out", type=FILE, required=True, help="The file of scores.")
@click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    metavar="NAME",
    help="The column of texts; twice for pairs.  [default: the only one with strings]",
)
@click.option(
    "--label-column", metavar="NAME", help="The column of labels.  [default: label or labels]"
)
@click.option("--split", metavar="NAME", help="Which part of a dataset with several.")
@click.option("--num-samples", type=_COUNT, metavar="N", help="Score N rows.  [default: all]")
@click.option("--batch-size", type=_COUNT, default=16, show_default=True, metavar="N")
@click.option(
    "--max-length",
    type=_COUNT,
    metavar="N",
    help="Cut texts after N tokens.  [default: 512, or what the model takes]",
)
@click.option(
    "--shuffle/--no-shuffle",
    default=True,
    show_default=True,
    help="Take rows in an order drawn from the seed: data are often sorted by label.",
)
@click.option(
    "--fisher-type",
    type=click.Choice(["empirical", "sampled", "exact"]),
    default="empirical",
    show_default=True,
    help="The labels given, labels drawn from the model, or all labels.",
)
@click.option(
    "--num-label-samples", type=_COUNT, default=1, show_default=True, metavar="N",
    help="Draws per row, for --fisher-type sampled.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="N"
)
@click.option(
    "--device", metavar="NAME", help="Such as cuda:1.  [default: cuda, without a GPU cpu]"
)
@click.option(
    "--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True,
    help="Of the weights; auto: as they are stored. Scores are float32.",
)  # fmt: skip
@click.option(
    "--architecture",
    metavar="CLASS",
    help="A class of transformers.  [default: what the model's config names]",
)
@click.option(
    "--resume",
    type=FILE,
    metavar="FILE",
    help="Keep running scores there, and go on from them: same model, data and options.",
)
@click.option("--mask", type=FILE, metavar="OUT", help="Write a mask too; with --density.")
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True), metavar="D",
    help="Share of weights in the mask, such as 0.005.",
)  # fmt: skip
@click.option(
    "--keep", multiple=True, metavar="NAME", help="A path or glob that is always in the mask."
)
@click.option("--exclude", multiple=True, metavar="NAME", help="One that never is.")
@click.option("--progress/--no-progress", default=True, show_default=True)
def score(model: Path, data: Path, out: Path, **options: Any) -> None:
    """Score every weight of MODEL on DATA: the Fisher information, sample by sample.

    MODEL is the folder of a transformers model: for sequence classification, a causal language
    model, or an encoder-decoder. DATA is a folder of the library datasets (save_to_disk), or a file
    .jsonl, .json, .csv, .parquet or .txt. Everything is read from this machine.
    """
    if (options["mask"] is None) != (options["density"] is None):
        raise click.UsageError("--mask and --density go together; give both or neither")
    if options["mask"] is None and (options["keep"] or options["exclude"]):
        raise click.UsageError("--keep and --exclude go with --mask and --density")
    with clean_errors():
        _refuse_bad_places(model, data, out, options["mask"], options["resume"])
        loaded = _load(model, options)
        rows = load_rows(data, split=options["split"])
        if (wanted := options["num_samples"]) is not None and wanted > len(rows):
            click.echo(f"note: {data} has {len(rows):,} rows; all of them are scored", err=True)
            options["num_samples"] = None
        batches = make_batches(
            loaded,
            rows,
            **{
                name: options[name]
                for name in (
                    "text_columns", "label_column", "batch_size", "max_length", "shuffle", "seed",
                )
            },
        )  # fmt: skip
        start = time.perf_counter()
        with _telling_how_to_go_on(options["resume"]):
            fisher = ff.estimate_fisher(
                loaded.model, batches, progress=options["progress"], resume_path=options["resume"],
                **{
                    name: options[name]
                    for name in ("num_samples", "fisher_type", "num_label_samples", "seed")
                },
            )  # fmt: skip
        seconds = time.perf_counter() - start
        fisher.save(out)
        click.echo(f"{out}: {fisher!r}, {seconds:.1f} s")
        if options["mask"] is not None:
            mask = ff.top_k_mask(
                fisher, density=options["density"], keep=options["keep"], exclude=options["exclude"]
            )
            mask.save(options["mask"])
            click.echo(f"{options['mask']}: {mask!r}")


def _load(folder: Path, options: dict[str, Any]) -> LoadedModel:
    """Load the model; say which of its weights are fresh; refuse a mask that it cannot have."""
    _hush()
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(
        folder,
        architecture=options["architecture"],
        dtype=options["dtype"],
        device=device,
        seed=options["seed"],
    )
    if options["mask"] is not None:  # not after hours of scoring
        _refuse_bad_mask(loaded.model, options)
    if loaded.fresh:
        more = f" and {len(loaded.fresh) - 4:,} more" if len(loaded.fresh) > 4 else ""
        click.echo(
            f"note: {folder} has no {', '.join(loaded.fresh[:4])}{more}: drawn at random, seed "
            f"{options['seed']}; their scores and those below them depend on it",
            err=True,
        )
    return loaded


@contextlib.contextmanager
def _telling_how_to_go_on(resume: Path | None) -> Iterator[None]:
    """Say after Ctrl-C where the scores so far are."""
    try:
        yield
    except KeyboardInterrupt:
        if resume is not None and resume.exists():
            click.echo(f"{resume} has scores to go on from: run the same command again", err=True)
        raise


def _refuse_bad_mask(model: nn.Module, options: dict[str, Any]) -> None:
    """Refuse names that the model does not have, and a density that they leave no room for."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    kept, eligible = split_by_rule(list(sizes), options["keep"], options["exclude"])
    budget(Totals.of(sizes, kept, eligible), kept, density=options["density"], k=None)


def _hush() -> None:
    """Leave stderr to our own progress bar and notes."""
    with contextlib.suppress(ImportError):  # which load_model and load_rows tell
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def _refuse_bad_places(model: Path, data: Path, *outputs: Path | None) -> None:
    """Refuse what could not be written after hours, or would take the place of something else."""
    paths = [path for path in outputs if path is not None]
    for path in paths:
        check_output(path, model, data)
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(
            "--out, --mask and --resume must be different files; got "
            f"{', '.join(repr(str(path)) for path in paths)}"
        )
