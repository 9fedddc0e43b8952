"""The command line: ``fishfast demo`` and ``fishfast info``."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
from tabulate import tabulate

import fishfast as ff

__all__ = ["main"]

_AT_LEAST_ONE = click.IntRange(min=1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ff.__version__, prog_name="fishfast")
def main() -> None:
    """Train only the weights that matter: FISH masks for PyTorch."""


@main.command()
def info() -> None:
    """Say what was compiled and what runs each operation here."""
    rows = [(key, value) for key, value in ff.build_info().items() if not isinstance(value, dict)]
    for operation, by_device in ff.build_info()["operations"].items():
        rows.append((operation, ", ".join(f"{road} on {kind}" for kind, road in by_device.items())))
    rows += [(f"no {name}", why) for name, why in ff.build_info()["unavailable"].items()]
    click.echo(tabulate(rows, tablefmt="plain", disable_numparse=True))


@main.command()
@click.option("--seeds", type=_AT_LEAST_ONE, metavar="N", help="How many seeds.  [default: 5]")
@click.option(
    "--epochs", type=_AT_LEAST_ONE, metavar="N", help="Passes over the 50 images.  [default: 40]"
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    metavar="FOLDER",
    help="Keep bases and deltas there.  [default: a temporary folder]",
)
@click.option("--smoke", is_flag=True, help="Take seconds: one seed, hardly any training.")
@click.option(
    "--choose-lr",
    is_flag=True,
    help="Instead of the comparison, repeat the choice of the learning rates (a few minutes).",
)
def demo(
    seeds: int | None, epochs: int | None, out: Path | None, smoke: bool, choose_lr: bool
) -> None:
    r"""Compare FISH masks with other ways to train few weights, on handwritten digits.

    Nothing is downloaded; about a minute on an idle core.
    \f

    Raises:
        UsageError: options that exclude each other.
        ClickException: the demo cannot run, or a delta did not survive its reload.
    """
    from fishfast import demo as room

    if choose_lr and (seeds is not None or out is not None):
        raise click.UsageError(
            "--choose-lr has seeds and a folder of its own; drop --seeds and --out"
        )
    epochs = epochs or (2 if smoke else room.EPOCHS)
    pretrain_epochs = 1 if smoke else room.PRETRAIN_EPOCHS
    start = time.perf_counter()
    try:
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
        if smoke:
            click.echo("This was --smoke: the numbers mean nothing.")
    except (room.DemoUnavailable, room.ReloadMismatch, OSError) as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Give the folder to write to: the user's, or one that goes away again."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="fishfast-") as name:
        yield Path(name)
