"""``fishfast demo``: the comparison on real data."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fishfast.cli.common import clean_errors
from fishfast.files.atomic import refuse_unwritable
from fishfast.report.plots import PlottingUnavailable, new_figure

if TYPE_CHECKING:
    from fishfast.demo import Run

__all__ = ["demo"]

_AT_LEAST_ONE = click.IntRange(min=1)


@click.command(short_help="Compare FISH masks with others on real data.")
@click.option("--seeds", type=_AT_LEAST_ONE, metavar="N", help="How many seeds.  [default: 5]")
@click.option(
    "--epochs", type=_AT_LEAST_ONE, metavar="N", help="Passes over the 50 images.  [default: 40]"
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    metavar="FOLDER",
    help="Keep bases and deltas there, and pictures.  [default: a temporary folder]",
)
@click.option(
    "--png",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    metavar="FOLDER",
    help="Draw pictures there: accuracy, masks, losses.  [default: as --out]",
)
@click.option("--smoke", is_flag=True, help="Take seconds: one seed, hardly any training.")
@click.option(
    "--choose-lr",
    is_flag=True,
    help="Instead of the comparison, repeat the choice of the learning rates (a few minutes).",
)
def demo(
    seeds: int | None,
    epochs: int | None,
    out: Path | None,
    png: Path | None,
    smoke: bool,
    choose_lr: bool,
) -> None:
    """Compare FISH masks with other ways to train few weights, on handwritten digits.

    Nothing is downloaded; about a minute on an idle core.
    """
    from fishfast import demo as room

    if choose_lr and not (seeds is None and out is None and png is None):
        raise click.UsageError(
            "--choose-lr has seeds and a folder of its own; drop --seeds and --out and --png"
        )
    epochs = epochs or (2 if smoke else room.EPOCHS)
    pretrain_epochs = 1 if smoke else room.PRETRAIN_EPOCHS
    start = time.perf_counter()
    with clean_errors():
        if png is not None:  # what is missing is told now, not after a minute
            new_figure(1, 1)
        for place in (out, png):
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
                refuse_unwritable(place / "accuracy.png")
        if choose_lr:
            chosen = room.choose_learning_rates(epochs=epochs, pretrain_epochs=pretrain_epochs)
            click.echo(room.describe_choice(chosen))
            return
        click.echo(room.describe_task() + "\n")
        with _folder(out) as folder:
            runs = room.compare(
                folder,
                seeds=seeds or (1 if smoke else room.SEEDS),
                epochs=epochs,
                pretrain_epochs=pretrain_epochs,
            )
        seconds = time.perf_counter() - start
        click.echo(room.describe_comparison(runs, seconds=seconds, kept_in=out))
        if (pictures := png or out) is not None:
            click.echo(_draw(runs, pictures, optional=png is None))
        if smoke:
            click.echo("This was --smoke: the numbers mean nothing.")


def _draw(runs: dict[str, list[Run]], folder: Path, *, optional: bool) -> str:
    """Draw the pictures; say where they are, or why there are none."""
    from fishfast import demo as room

    try:
        files = room.draw_pictures(runs, folder)
    except PlottingUnavailable as error:
        if not optional:
            raise
        return f"No pictures: {error}"
    return f"The pictures are in {folder}: {', '.join(file.name for file in files)}."


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Give the folder to write to: the user's, or one that goes away again."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="fishfast-") as name:
        yield Path(name)
