"""Pictures, with matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fishfast.files.atomic import PathLike, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "VERMILION",
    "PlottingUnavailable",
    "draw_layers",
    "new_figure",
    "save_png",
]

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, PURPLE, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
GREY = "#666666"
# More parameters than this get no name each.
_MAX_NAMED = 48
_MAX_LABELS = 50


class PlottingUnavailable(ImportError):
    """matplotlib is missing; the text says what to do."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that no window and no other figure knows of.

    Args:
        width: in inches.
        height: in inches.

    Returns:
        The figure.

    Raises:
        PlottingUnavailable: matplotlib is not installed.
    """
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise PlottingUnavailable(
            'pictures need matplotlib, which is not installed; run: pip install "fishfast[plot]"'
        ) from error
    made: Figure = figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
    return made


def save_png(figure: Figure, path: PathLike) -> None:
    """Write a figure, atomically.

    Args:
        figure: what to write.
        path: the file; its folder must exist.
    """
    # Without the version, the same figure gives the same bytes.
    replace_file(
        path, lambda place: figure.savefig(place, format="png", metadata={"Software": None})
    )


def draw_layers(
    names: Sequence[str],
    values: Sequence[float],
    *,
    is_matrix: Sequence[bool],
    title: str,
    label: str,
    overall: tuple[float, str] | None = None,
) -> Figure:
    """Draw one value >= 0 for each parameter of a model, in its order, on a logarithmic scale.

    Few parameters get a bar each beside their names; many get a bar without a name each, and the
    names of the blocks below.

    Args:
        names: of the parameters.
        values: one for each.
        is_matrix: whether a parameter has two dimensions or more: another colour.
        title: what it is.
        label: of the values, with their unit.
        overall: a value to mark with a line, and what it is.

    Returns:
        The figure.

    Raises:
        PlottingUnavailable: matplotlib is not installed.
    """
    named = len(names) <= _MAX_NAMED
    height = 1.6 + 0.19 * max(4, len(names)) if named else 4.6
    figure = new_figure(9, height)
    axes = figure.add_subplot()
    marked = [] if overall is None else [overall[0]]
    positive = [value for value in (*values, *marked) if value > 0]
    # Whole powers of ten, so that the axis has two labels at least.
    low = 10.0 ** math.floor(math.log10(min(positive)) - 0.01) if positive else 0.1
    high = 10.0 ** math.ceil(math.log10(max(positive))) if positive else 1.0
    places = range(len(names))
    colors = [BLUE if matrix else ORANGE for matrix in is_matrix]
    lengths = [max(value, low) - low for value in values]
    if named:
        axes.barh(places, lengths, left=low, color=colors, height=0.8)
    else:
        axes.bar(places, lengths, bottom=low, color=colors, width=1.0)
    zeros = [place for place, value in zip(places, values, strict=True) if value == 0]
    floor = [low] * len(zeros)
    if zeros:  # an empty line would have a place in the layout: a blank strip
        axes.plot(
            floor if named else zeros, zeros if named else floor, "x", color=GREY,
            markersize=5 if named else 3, clip_on=False, zorder=5,
        )  # fmt: skip
    if named:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(label)
        axes.set_yticks(list(places), [_short(name) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first parameter on top
        axes.grid(axis="x", color="#dddddd")
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel(label)
        _label_blocks(axes, names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    if overall is not None:
        line = axes.axvline if named else axes.axhline
        line(overall[0], color="black", linestyle="--", linewidth=1)
    _legend(axes, is_matrix, bool(zeros), overall)
    axes.set_title(title, loc="left", fontsize=10, pad=26)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _legend(
    axes: Axes, is_matrix: Sequence[bool], zeros: bool, overall: tuple[float, str] | None
) -> None:
    """Say what the colours are, above the plot, where nothing can be hidden."""
    patch: Any = importlib.import_module("matplotlib.patches").Patch
    line: Any = importlib.import_module("matplotlib.lines").Line2D
    handles = []
    if any(is_matrix):
        handles.append(patch(color=BLUE, label="matrices and kernels"))
    if not all(is_matrix):
        handles.append(patch(color=ORANGE, label="vectors (biases, norms)"))
    if zeros:
        handles.append(line([], [], marker="x", color=GREY, linestyle="", label="none"))
    if overall is not None:
        handles.append(line([], [], color="black", linestyle="--", linewidth=1, label=overall[1]))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False,
        fontsize=8, borderaxespad=0.2, handlelength=1.4,
    )  # fmt: skip


def _label_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Name the blocks of a model with many parameters, and shade every other one."""
    starts: list[tuple[int, str]] = []
    for place, name in enumerate(names):
        block = _block(name)
        if not starts or starts[-1][1] != block:
            starts.append((place, block))
    ends = [place for place, _ in starts[1:]] + [len(names)]
    sizes = {start: end - start for (start, _), end in zip(starts, ends, strict=True)}
    for start, size in itertools.islice(sizes.items(), 0, None, 2):
        axes.axvspan(start - 0.5, start + size - 0.5, color="#f2f2f2", zorder=0, linewidth=0)
    shown: list[tuple[int, str]] = []
    for place, block in sorted(starts, key=lambda found: -sizes[found[0]]):  # large ones first
        if all(abs(place - other) >= len(names) / _MAX_LABELS for other, _ in shown):
            shown.append((place, block))
    axes.set_xticks(
        [place for place, _ in shown], [_short(block, 30) for _, block in shown],
        rotation=60, ha="right", rotation_mode="anchor", fontsize=7,
    )  # fmt: skip


def _block(name: str) -> str:
    """Return a name up to its first number, such as ``model.layers.3``, or its module."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match[1] if match else name.rpartition(".")[0] or name


def _short(name: str, limit: int = 48) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]
