"""Pictures of the sweeps in one file of figures; colours that the colour-blind tell apart."""

from __future__ import annotations

import contextlib
import math
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from figures import OURS, Figures, Run, is_floor
from machine import machine_line

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a dollar in a title is one
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import PolyCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter  # noqa: E402

__all__ = ["draw_all"]

# Okabe and Ito's palette, each with a marker and a dash of its own. The first is fishfast's.
_STYLES = [
    ("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "--"), ("#56B4E9", "P", "-."), ("#000000", "X", ":"),
]  # fmt: skip
_FLOOR = {"color": "#666666", "linestyle": (0, (1, 1)), "linewidth": 1.5, "marker": "_"}
# What may differ between two cases; a line joins those that differ in what is on its axis alone.
_PARAMETERS = (
    "device", "model", "kind", "values", "dtype", "num_tensors", "num_params", "density", "batch",
    "length",
)  # fmt: skip
_FOLLOWS = {"length": ("num_params",)}  # a longer model has more position embeddings
_WORDS = {
    "num_params": "n, number of scores", "density": "density, part of the weights that is trained",
    "length": "T, tokens per sample", "batch": "B, samples per batch",
}  # fmt: skip
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_PANELS = 4
_SPREAD = ("p20_us", "p80_us")


class _NotDrawn(Exception):
    """What a plot needs is not in the file."""


def draw_all(run: Run, out: Path) -> list[tuple[str, str]]:
    """Draw every plot that the file has the figures for.

    Args:
        run: the file's content.
        out: the folder of the PNGs.

    Returns:
        Of each plot its title, and the name of its file or why there is none.
    """
    plots: list[tuple[str, str, Callable[[Run], Figure]]] = [
        ("Top-k: time against n", "topk_time.png", _topk),
        ("Optimizer step: time against density", "step_density.png", _step),
        ("Fisher: time and memory against T and B", "fisher_size.png", _fisher),
        ("Training: memory and time", "training.png", _training),
    ]
    results = []
    for title, name, draw in plots:
        try:
            figure = draw(run)
        except _NotDrawn as reason:
            results.append((title, str(reason)))
            continue
        _finish(figure, title, run)
        figure.savefig(out / name, dpi=150)
        plt.close(figure)
        results.append((title, name))
    return results


def _topk(run: Run) -> Figure:
    groups = _sweeps(run, "topk_mask", "num_params")
    figure, axes = _panels(len(groups))
    for panel, (label, rows) in zip(axes, groups, strict=True):
        _lines(panel, rows, "num_params", "median_us", 1e-3, run)
        panel.set_title(label, fontsize=9)
        panel.set_ylabel("time, ms")
    return figure


def _step(run: Run) -> Figure:
    groups = _sweeps(run, "sparse_adam", "density")
    figure, axes = _panels(len(groups))
    for panel, (label, rows) in zip(axes, groups, strict=True):
        _lines(panel, rows, "density", "median_us", 1e-3, run)
        panel.set_title(label, fontsize=9)
        panel.set_ylabel("time per step, ms")
    return figure


def _fisher(run: Run) -> Figure:
    sweeps = {}
    for size in ("length", "batch"):
        with contextlib.suppress(_NotDrawn):
            sweeps[size] = _sweeps(run, "fisher_sweep", size)[0][1]
    if not sweeps:
        raise _NotDrawn("stage fisher_sweep has no two values of length or batch in this file")
    figure, axes = plt.subplots(2, len(sweeps), figsize=(5.2 * len(sweeps), 7.0), squeeze=False)
    for column, (size, rows) in enumerate(sweeps.items()):
        _lines(axes[0][column], rows, size, "us_per_sample", 1e-3, run, floor=False)
        _lines(axes[1][column], rows, size, "peak_bytes", 2.0**-20, run, floor=False)
        axes[0][column].set_title(_fixed(rows, size), fontsize=9)
        axes[0][column].set_ylabel("time per sample, ms")
        axes[1][column].set_ylabel("memory, MiB")
    return figure


def _training(run: Run) -> Figure:
    cases = [case for case in run.cases("train_step") if len(case.rows) >= 2]
    if not cases:
        raise _NotDrawn("stage train_step has no case with two contenders in this file")
    cases = cases[:_MOST_PANELS]
    most = max(len(case.rows) for case in cases)
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(10.0, len(cases) * (0.8 + 0.34 * most) + 1.0), squeeze=False
    )
    for panels, case in zip(axes, cases, strict=True):
        rows = [row for row in case.rows if not is_floor(row)]
        rows.sort(key=lambda row: not row["contender"].startswith(OURS))  # ours on top
        names = [row["contender"] for row in rows]
        memory = [row.get("total_bytes", row.get("peak_bytes", 0)) / 2**20 for row in rows]
        (low, times, high), line_at = _times(rows)
        spread = [[abs(m - e) for m, e in zip(times, ends, strict=True)] for ends in (low, high)]
        words = ("memory at its peak, MiB", "time per step and its p20 to p80, ms")
        bars = ((memory, words[0], None), (times, words[1], spread))
        for panel, (values, word, error) in zip(panels, bars, strict=True):
            colours = [_style(name, run)[0] for name in names]
            drawn = panel.barh(names, values, color=colours, xerr=error, ecolor="#888888")
            numbers = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
            over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            panel.bar_label(drawn, labels=numbers, padding=3, fontsize=8, bbox=over_the_line)
            longest = max(map(sum, zip(values, *(error or [])[1:], strict=True)))
            panel.set_xlim(0, 1.2 * longest)
            panel.set_xlabel(word)
            panel.xaxis.set_major_locator(MaxNLocator(6))
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            panel.invert_yaxis()  # first on top
            panel.spines[["top", "right"]].set_visible(False)
        if line_at is not None:
            line = {"color": _FLOOR["color"], "linestyle": _FLOOR["linestyle"]}
            name = f"{rows[0].get('floor_name', 'floor')} of full fine-tuning"
            panels[1].axvline(line_at, label=name, **line)
        panels[0].set_title(case.title, loc="left", fontsize=9)
        panels[1].set_yticklabels([])
    return figure


def _times(rows: list[Figures]) -> tuple[list[list[float]], float | None]:
    """Return p20, median and p80 in ms, and what they were timed in turns with, if they were.

    Then each is its multiple of that, at the median speed that the machine had: bars that were
    measured one after the other stand in the right ratio to the line and to each other.
    """
    keys = ("times_floor_p20", "times_floor", "times_floor_p80")
    if all(key in row for row in rows for key in (*keys, "floor_us")):
        line_at = statistics.median(row["floor_us"] for row in rows) / 1e3
        return [[line_at * row[key] for row in rows] for key in keys], line_at
    low, high = _SPREAD
    return [[row[key] / 1e3 for row in rows] for key in (low, "median_us", high)], None


def _rows(run: Run, stage: str) -> list[Figures]:
    return [row for case in run.cases(stage) for row in case.rows]


def _sweeps(run: Run, stage: str, axis: str) -> list[tuple[str, list[Figures]]]:
    """Return the cases that differ in one parameter alone: the longest sweeps, with their names."""
    groups: dict[tuple[Any, ...], list[Figures]] = {}
    for row in _rows(run, stage):
        if axis in row:
            varying = (axis, *_FOLLOWS.get(axis, ()))
            same = tuple((p, row[p]) for p in _PARAMETERS if p in row and p not in varying)
            groups.setdefault(same, []).append(row)
    sizes = {same: len({row[axis] for row in rows}) for same, rows in groups.items()}
    longest = max(sizes.values(), default=0)
    if longest < 2:
        raise _NotDrawn(f"stage {stage} has no two values of {axis} in this file")
    chosen = [same for same in groups if sizes[same] >= 2]
    chosen.sort(key=lambda same: -sizes[same])  # stable: the file's order among equals
    return [(_label(same), groups[same]) for same in chosen[:_MOST_PANELS]]


def _label(same: tuple[tuple[str, Any], ...]) -> str:
    words = {
        "density": lambda v: f"density {100 * v:g} %",
        "num_params": lambda v: f"n = {v:,}",
        "num_tensors": lambda v: f"{v:,} tensor{'s' * (v != 1)}",
        "batch": lambda v: f"B = {v}",
        "length": lambda v: f"T = {v}",
    }
    return ", ".join(words.get(name, str)(value) for name, value in same)


def _fixed(rows: list[Figures], size: str) -> str:
    other = "batch" if size == "length" else "length"
    model = rows[0]["case"].split(" T=")[0]
    return f"{model}, {other[0].upper() if other == 'batch' else 'T'} = {rows[0].get(other)}"


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    rows = math.ceil(count / columns)
    size = (5.2 * columns if columns > 1 else 7.0, 3.6 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    panels = list(axes.flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _lines(
    panel: Axes, rows: list[Figures], x: str, y: str, scale: float, run: Run, *, floor: bool = True
) -> None:
    """Draw a line per contender with its p20 to p80, on logarithmic axes, and the floor."""
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = sorted(
            (r for r in rows if r["contender"] == contender and y in r), key=lambda r: r[x]
        )
        colour, marker, dash = _style(contender, run)
        line = {"color": colour, "marker": marker, "linestyle": dash}
        line["zorder"] = 3 if contender == OURS else 2
        if any(is_floor(row) for row in own):
            line = dict(_FLOOR)
        panel.plot(
            [r[x] for r in own], [scale * r[y] for r in own], label=contender, markersize=5, **line
        )
        if y != "peak_bytes":
            spread = [[scale * r[y] * r[p] / r["median_us"] for r in own] for p in _SPREAD]
            panel.fill_between(
                [r[x] for r in own], *spread, color=line["color"], alpha=0.15, linewidth=0
            )
    bound = [r for r in rows if r["contender"] == OURS and "floor_us" in r] if floor else []
    if bound:
        bound.sort(key=lambda r: r[x])
        name = f"floor: {bound[0].get('floor_name', 'measured')}"
        panel.plot(
            [r[x] for r in bound], [scale * r["floor_us"] for r in bound], label=name, **_FLOOR
        )
    panel.set_xscale("log", base=2 if x in ("length", "batch") else 10)
    panel.set_yscale("log")
    if len(ticks := sorted({row[x] for row in rows})) <= 10:
        panel.set_xticks(ticks)
    panel.xaxis.set_major_formatter(lambda t, _: f"{100 * t:g} %" if x == "density" else _size(t))
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(_WORDS[x])
    panel.grid(which="major", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _size(value: float) -> str:
    """Return a number for an axis: 128, 2²⁰, 10⁹, 3e+07."""
    if value < 10_000:
        return f"{value:g}"
    for base in (10, 2):
        power = round(math.log(value, base))
        if base**power == value:
            return f"{base}{str(power).translate(_RAISED)}"
    return f"{value:.2g}"


def _style(contender: str, run: Run) -> tuple[str, str, str]:
    """Return a contender's colour, marker and dash, the same in every picture of a file."""
    stage = next(row["stage"] for row in run.figures if row["contender"] == contender)
    others = dict.fromkeys(
        row["contender"] for row in run.figures
        if row["stage"] == stage and row["contender"] != OURS and not is_floor(row)
    )  # fmt: skip
    place = (
        0 if contender == OURS else 1 + list(others).index(contender) if contender in others else 6
    )
    return _STYLES[place] if place < len(_STYLES) else _STYLES[1 + place % (len(_STYLES) - 1)]


def _is_shaded(panel: Axes) -> bool:
    return any(isinstance(drawn, PolyCollection) for drawn in panel.collections)


def _finish(figure: Figure, title: str, run: Run) -> None:
    """Put one legend for all panels, the title, and the machine under a figure."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        entries.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    shaded = "shaded: p20 to p80; " if any(map(_is_shaded, figure.axes)) else ""
    words = f"{shaded}{machine_line(run.machine)}"
    footer = textwrap.fill(words, width=int(17 * figure.get_figwidth()))
    longest = max((len(name) for name in entries), default=0)
    columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.7 + 0.065 * longest))))
    legend = 0.1 + 0.2 * math.ceil(len(entries) / columns)  # inches
    figure.set_figheight(figure.get_figheight() + legend)
    height = figure.get_figheight()
    bottom = (0.25 + 0.15 * (footer.count("\n") + 1)) / height
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="lower center", ncol=columns, fontsize=8,
            frameon=False, bbox_to_anchor=(0.5, bottom - 0.05 / height),
        )  # fmt: skip
        bottom += legend / height
    marked = f"REHEARSAL, not a measurement\n{title}" if run.machine.get("rehearsal") else title
    figure.suptitle(marked, fontsize=11)
    figure.text(0.5, 0.08 / height, footer, ha="center", va="bottom", fontsize=6.5, color="#444444")
    figure.tight_layout(rect=(0, bottom, 1, 1 - 0.05 / height))
