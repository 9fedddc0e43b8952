"""Runs every method on every seed; and, apart from that, the choice of the learning rates."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from fishfast.demo.methods import BASE_FILE, GRID, METHODS, Run, run
from fishfast.demo.task import make_task

__all__ = [
    "CHOICE_SEEDS",
    "EPOCHS",
    "PRETRAIN_EPOCHS",
    "SEEDS",
    "choose_learning_rates",
    "compare",
    "num_threads",
]

SEEDS = 5
EPOCHS = 40
PRETRAIN_EPOCHS = 6
CHOICE_SEEDS = (100, 101, 102)  # never in the comparison


def compare(
    folder: Path,
    *,
    seeds: int = SEEDS,
    epochs: int = EPOCHS,
    pretrain_epochs: int = PRETRAIN_EPOCHS,
) -> dict[str, list[Run]]:
    """Run every method on the seeds 0, 1, ...

    Args:
        folder: gets a folder per seed with the base and the file of every method.
        seeds: how many.
        epochs: passes over the training images of digits 5-9.
        pretrain_epochs: passes over digits 0-4.

    Returns:
        Method name -> one `Run` per seed.

    Raises:
        DemoUnavailable: scikit-learn is not installed.
        ReloadMismatch: a saved file did not give the trained network again.

    Note:
        Deterministic on one machine with one number of threads, but for the seconds.
    """
    runs: dict[str, list[Run]] = {method.name: [] for method in METHODS}
    with _threads(), _bar(seeds * (pretrain_epochs + len(METHODS) * epochs)) as bar:
        for seed in range(seeds):
            where = folder / f"seed-{seed}"
            where.mkdir(parents=True, exist_ok=True)
            _say(bar, f"seed {seed + 1}/{seeds}: pre-training")
            task = make_task(seed, pretrain_epochs, bar.update)
            task.save_base(where / BASE_FILE)
            for method in METHODS:
                _say(bar, f"seed {seed + 1}/{seeds}: {method.name}")
                done = run(
                    method, task, epochs=epochs, judge=task.test, folder=where, tick=bar.update
                )
                runs[method.name].append(done)
    return runs


def choose_learning_rates(
    *, epochs: int = EPOCHS, pretrain_epochs: int = PRETRAIN_EPOCHS
) -> dict[str, dict[float, float]]:
    """Measure every method at every learning rate of `GRID`: how those of `METHODS` were chosen.

    On seeds that the comparison does not use, and judged on images that are in no test set.

    Args:
        epochs: as in `compare`.
        pretrain_epochs: as in `compare`.

    Returns:
        Method name -> learning rate -> mean accuracy in percent on the validation images.

    Raises:
        DemoUnavailable: scikit-learn is not installed.
        ReloadMismatch: a saved file did not give the trained network again.
    """
    per_seed = pretrain_epochs + len(METHODS) * len(GRID) * epochs
    accuracies: dict[str, dict[float, list[float]]] = {
        method.name: {lr: [] for lr in GRID} for method in METHODS
    }
    with (
        _threads(),
        tempfile.TemporaryDirectory(prefix="fishfast-") as folder,
        _bar(len(CHOICE_SEEDS) * per_seed) as bar,
    ):
        for seed in CHOICE_SEEDS:
            _say(bar, f"seed {seed}: pre-training")
            task = make_task(seed, pretrain_epochs, bar.update)
            task.save_base(Path(folder, BASE_FILE))
            for method in METHODS:
                for lr in GRID:
                    _say(bar, f"seed {seed}: {method.name}, lr {lr:g}")
                    done = run(
                        dataclasses.replace(method, lr=lr),
                        task,
                        epochs=epochs,
                        judge=task.validation,
                        folder=Path(folder),
                        tick=bar.update,
                    )
                    accuracies[method.name][lr].append(done.accuracy)
    return {
        name: {lr: statistics.mean(found) for lr, found in by_lr.items()}
        for name, by_lr in accuracies.items()
    }


def _say(bar: tqdm, what: str) -> None:
    bar.set_description(what, refresh=sys.stderr.isatty())


def _bar(total: int) -> tqdm:
    # A log file gets a line now and then, a terminal a bar that moves.
    pause = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, unit="epoch", mininterval=pause, leave=False, dynamic_ncols=True)


def num_threads() -> int:
    """Return how many threads the demo uses: one, unless OMP_NUM_THREADS asks for more.

    A step takes some ten milliseconds, in which a second thread wins little; where another program
    has that core, waiting for it made the demo five times slower.
    """
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
