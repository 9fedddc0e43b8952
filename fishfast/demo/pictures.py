"""The demo's pictures: accuracy against density, where the masks fell, and the training losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fishfast.demo.methods import METHODS, Run
from fishfast.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_pictures"]

Runs = Mapping[str, Sequence[Run]]

_COLORS = {
    "dense": "black", "FISH": BLUE, "random": VERMILION, "BitFit": GREEN, "head": PURPLE,
}  # fmt: skip
_STYLES = {"10": "-", "2": "--", "0.5": ":"}
_MARKERS = {"10": "o", "2": "s", "0.5": "D"}


def draw_pictures(runs: Runs, folder: Path) -> list[Path]:
    """Draw what the comparison found.

    Args:
        runs: what `compare` returned.
        folder: where to; made if it does not exist.

    Returns:
        The files.

    Raises:
        PlottingUnavailable: matplotlib is not installed.
    """
    drawn = {"accuracy": _accuracy(runs), "layers": _layers(runs), "losses": _losses(runs)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        save_png(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in drawn]


def _family(name: str) -> tuple[str, str]:
    """Split the name of a method into its kind and its density in percent."""
    kind, _, rest = name.partition(" ")
    return kind, rest.removesuffix(" %")


def _mean_and_spread(runs: Sequence[Run]) -> tuple[float, float]:
    found = [run.accuracy for run in runs]
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def _accuracy(runs: Runs) -> Figure:
    """Draw accuracy against the share of trained weights; methods of one size are lines."""
    figure = new_figure(7, 4.4)
    axes = figure.add_subplot()
    num_params, seeds = runs["dense"][0].num_trained, len(runs["dense"])
    for name in ("dense", "BitFit", "head only"):
        color = _COLORS[_family(name)[0]]
        mean, spread = _mean_and_spread(runs[name])
        share = 100 * runs[name][0].num_trained / num_params
        axes.axhline(mean, color=color, linestyle="--", linewidth=1.2)
        axes.axhspan(mean - spread, mean + spread, color=color, alpha=0.08, linewidth=0)
        axes.annotate(
            f"{name} ({round(share, 2):g} %)", (0.995, mean), (0, 3), color=color,
            ha="right", va="bottom", xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    for kind, marker, beside in (("FISH", "o", 0.97), ("random", "s", 1.03)):
        names = [name for name in runs if _family(name)[0] == kind]
        shares = [beside * 100 * runs[name][0].num_trained / num_params for name in names]
        found = [_mean_and_spread(runs[name]) for name in names]
        axes.errorbar(
            shares, [mean for mean, _ in found], [spread for _, spread in found], marker=marker,
            color=_COLORS[kind], capsize=4, linewidth=1.5, label=f"{kind} mask",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.5, 2, 10], ["0.5", "2", "10"])
    axes.minorticks_off()
    axes.set_xlim(0.35, 30)
    axes.set_xlabel("trained weights, % of the network (the head's 0.1 % included)")
    axes.set_ylabel(f"accuracy on {runs['dense'][0].num_judged} test images, %")
    spread_of = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(f"Digits 5-9 from 50 images: {spread_of}", loc="left", fontsize=10, pad=28)
    axes.grid(color="#e5e5e5")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, frameon=False,
        borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _layers(runs: Runs) -> Figure:
    """Draw the density of each parameter in FISH masks, a mean over the seeds."""
    fish = [method.name for method in METHODS if _family(method.name)[0] == "FISH"]
    names = list(runs[fish[0]][0].densities)
    figure = new_figure(7.5, 1.5 + 0.22 * len(names))
    axes = figure.add_subplot()
    means = {
        name: [100 * statistics.mean(r.densities[own] for r in runs[name]) for own in names]
        for name in fish
    }
    shown = [m for found in means.values() for m in found if m > 0]
    shown += [float(_family(name)[1]) for name in fish]
    low = 10.0 ** math.floor(math.log10(min(shown)))
    # Beside each other, and those of no weight in a band of their own, left of the scale.
    for name, color, beside in zip(fish, (BLUE, ORANGE, GREEN), (-0.2, 0.0, 0.2), strict=True):
        density = _family(name)[1]
        axes.axvline(float(density), color=color, linewidth=1, linestyle="--")
        axes.plot(
            [mean or low / 2 for mean in means[name]], [row + beside for row in range(len(names))],
            linestyle="", marker=_MARKERS[density], color=color, markersize=5, zorder=3,
            clip_on=False, label=f"mask of {density} %",
        )  # fmt: skip
    axes.axvspan(low / 3, 0.75 * low, color="#eeeeee", linewidth=0)
    axes.annotate(
        "none", (low / 2, 1), (0, 3), xycoords=axes.get_xaxis_transform(), fontsize=8, color=GREY,
        textcoords="offset points", ha="center",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low / 3, 100)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("selected weights, % of the tensor (dashed: of the whole network)")
    seeds = len(runs[fish[0]])
    of = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(
        f"Where FISH masks fell; {of}; the head is always in", loc="left", fontsize=10, pad=30
    )
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9,
        borderaxespad=0.2, handletextpad=0.2,
    )  # fmt: skip
    axes.grid(color="#e5e5e5")
    return figure


def _losses(runs: Runs) -> Figure:
    """Draw the training loss epoch by epoch, a mean over the seeds."""
    figure = new_figure(7.5, 4.4)
    axes = figure.add_subplot()
    for method in METHODS:
        kind, density = _family(method.name)
        curves = [run.losses for run in runs[method.name]]
        epochs = range(1, len(curves[0]) + 1)
        axes.plot(
            epochs, [statistics.mean(of_epoch) for of_epoch in zip(*curves, strict=True)],
            color=_COLORS[kind], linestyle=_STYLES.get(density, "-"), linewidth=1.6,
            marker="." if len(epochs) < 8 else None, label=method.name,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("epoch (passes over the 50 training images)")
    axes.set_ylabel("training loss, nats per image")
    seeds = len(runs["dense"])
    of = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(f"Training loss, {of}", loc="left", fontsize=10)
    axes.grid(color="#e5e5e5")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return figure
