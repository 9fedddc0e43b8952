"""What the demo prints."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tabulate import SEPARATING_LINE, tabulate

import fishfast as ff
from fishfast.demo.comparison import CHOICE_SEEDS, num_threads
from fishfast.demo.methods import GRID, METHODS, Run
from fishfast.demo.task import TRAIN_PER_DIGIT, DigitNet

__all__ = ["describe_choice", "describe_comparison", "describe_task"]

_GRID_TEXT = ", ".join(f"{lr:g}" for lr in GRID)


def describe_task() -> str:
    """Return what is about to be compared."""
    with torch.device("meta"):
        network = DigitNet()
    num_params = sum(p.numel() for p in network.parameters())
    num_head = sum(p.numel() for p in network.head.parameters())
    return (
        f"A conv net of {num_params:,} weights, pre-trained on handwritten digits 0-4, gets a new "
        f"head\n({num_head} weights) and learns digits 5-9 from {5 * TRAIN_PER_DIGIT} images. "
        "How many weights must be trained for that?"
    )


def describe_comparison(
    runs: Mapping[str, Sequence[Run]], *, seconds: float, kept_in: Path | None
) -> str:
    """Return the table and how to read it.

    Args:
        runs: what `compare` returned.
        seconds: what all of it took.
        kept_in: the folder of the deltas, if they were kept.

    Returns:
        Several lines of text.
    """
    num_seeds = len(runs[METHODS[0].name])
    num_test = runs["dense"][0].num_judged
    num_params = runs["dense"][0].num_trained
    rows: list[list[str] | str] = []
    for method in METHODS:
        rows.append(_row(method.name, method.lr, runs[method.name], num_params))
        if method.name in ("dense", "FISH 0.5 %", "random 0.5 %"):
            rows.append(SEPARATING_LINE)
    table = tabulate(
        rows,
        headers=(
            "method", "accuracy %", "reloaded %", "trained weights", "share %", "delta bytes",
            "seconds", "lr",
        ),
        colalign=("left", *["right"] * 7),
        disable_numparse=True,
    )  # fmt: skip
    spread = f"± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "of one seed"
    where = f"The deltas are in {kept_in}." if kept_in else "--out FOLDER keeps the deltas."
    num_runs = num_seeds * len(METHODS)
    return f"""{table}

accuracy    mean {spread}, on {num_test} test images; guessing gives
            20 %, one image is {100 / num_test:.2f} %. A difference within the spread says nothing.
reloaded    the accuracy again, each file put on a fresh base with another random head: equal to
            the digit, logits equal bit for bit, {num_runs} of {num_runs}. {where}
delta       mean size of the file that is kept or sent per task: indices, values and BatchNorm
            statistics; for dense the whole state dict. The new head is in every mask and counted.
seconds     one run: scoring, mask, training. So small a net gains nothing in time from a sparse
            step; the gain to look at here is the bytes.
lr          each row's best of {_GRID_TEXT}, chosen on other seeds and
            without the test images (--choose-lr repeats that). Base, training images, order and
            epochs are the same in all rows.

{machine(seconds)}"""


def _row(name: str, lr: float, runs: Sequence[Run], num_params: int) -> list[str]:
    accuracies = [run.accuracy for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    return [
        name,
        f"{statistics.mean(accuracies):.2f}{spread}",
        f"{statistics.mean(run.reloaded for run in runs):.2f}",
        f"{runs[0].num_trained:,}",
        f"{100 * runs[0].num_trained / num_params:.2f}",
        f"{round(statistics.mean(run.file_bytes for run in runs)):,}",
        f"{statistics.mean(run.seconds for run in runs):.2f}",
        f"{lr:g}",
    ]


def describe_choice(accuracies: Mapping[str, Mapping[float, float]]) -> str:
    """Return the grid of `choose_learning_rates`, its best entries, and what the demo uses."""
    rows = []
    for method in METHODS:
        by_lr = accuracies[method.name]
        best = max(by_lr, key=lambda lr: (by_lr[lr], -lr))
        row = [method.name, *(f"{by_lr[lr]:.2f}{'*' if lr == best else ' '}" for lr in GRID)]
        rows.append([*row, f"{method.lr:g}"])
    table = tabulate(
        rows,
        headers=("method", *(f"lr {lr:g} " for lr in GRID), "in use"),
        colalign=("left", *["right"] * (len(GRID) + 1)),
        disable_numparse=True,
    )
    return (
        f"{table}\n\n* best; on a tie the smaller rate. Accuracy in percent on validation images, "
        f"mean over the\nseeds {', '.join(map(str, CHOICE_SEEDS))}; neither these seeds nor these "
        "images are judged in the comparison."
    )


def machine(seconds: float) -> str:
    """Return the line that names time, machine and versions."""
    info = ff.build_info()
    road = "compiled extension" if info["extension"] else "pure Python, no compiled extension"
    threads = num_threads()
    return (
        f"{seconds:.0f} s on {_processor()}, {threads} thread{'s' * (threads > 1)} of "
        f"{os.cpu_count()} cores; fishfast {info['version']} ({road}), torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
