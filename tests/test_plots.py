"""Pictures: what is drawn where, labels that do not overlap, and no matplotlib."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fishfast as ff
from fishfast.cli import main
from fishfast.demo import METHODS, Run, draw_pictures
from fishfast.report.plots import BLUE, ORANGE, draw_layers

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread


def names_of(blocks: int) -> list[str]:
    parts = ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.down")
    inner = [f"{part}_proj.{kind}" for part in parts for kind in ("weight", "bias")]
    body = [f"model.layers.{i}.{name}" for i in range(blocks) for name in inner]
    return ["model.embedding.weight", "model.positions.weight", *body, "head.weight"]


def assert_labels_apart(figure) -> None:
    """No label of an axis, a title or a legend covers another one or leaves the picture.

    And no strip below them is left blank.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (axes,) = figure.axes
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        shown = [label for label in labels if label.get_text() and label.get_visible()]
        # Turned labels: boxes around them overlap, the lines of text do not if their ends do not.
        if any(label.get_rotation() for label in shown):
            ends = sorted(label.get_window_extent(renderer).x1 for label in shown)
            assert all(b - a > 8 for a, b in itertools.pairwise(ends))
            continue
        boxes = [label.get_window_extent(renderer) for label in shown]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
    whole = figure.bbox
    lowest = [label.get_window_extent(renderer).y0 for label in axes.get_xticklabels()]
    assert min(axes.xaxis.label.get_window_extent(renderer).y0, *lowest) < whole.y0 + 15
    legend, title = axes.get_legend(), axes._left_title
    boxes = [part.get_window_extent(renderer) for part in (legend, title) if part is not None]
    for label in (axes.xaxis.label, axes.yaxis.label):
        if label.get_text():
            boxes.append(label.get_window_extent(renderer))
    for box in boxes:
        assert box.x0 >= whole.x0 - 1
        assert box.x1 <= whole.x1 + 1
        assert box.y0 >= whole.y0 - 1
        assert box.y1 <= whole.y1 + 1
    assert not boxes[0].overlaps(boxes[1])


@pytest.mark.parametrize("blocks", [0, 1, 4, 33, 100])
def test_a_bar_for_each_parameter_and_no_label_on_another(blocks: int) -> None:
    names = names_of(blocks)
    values = [0.0 if i % 5 == 3 else 100 * 0.7 ** (i % 23) for i in range(len(names))]
    figure = draw_layers(
        names, values, is_matrix=[name.endswith("weight") for name in names],
        title="title", label="density, %", overall=(3.0, "whole model: 3 %"),
    )  # fmt: skip
    assert_labels_apart(figure)
    (axes,) = figure.axes
    named = len(names) <= 48
    bars = [patch for patch in axes.patches if hasattr(patch, "get_width")]
    bars = [bar for bar in bars if to_hex(bar.get_facecolor()).upper() in (BLUE, ORANGE)]
    assert len(bars) == len(names)
    for bar, name, value in zip(bars, names, values, strict=True):
        assert to_hex(bar.get_facecolor()).upper() == (BLUE if name.endswith("weight") else ORANGE)
        end = bar.get_x() + bar.get_width() if named else bar.get_y() + bar.get_height()
        low = (axes.get_xlim() if named else axes.get_ylim())[0]
        assert end == pytest.approx(max(value, low))
    low, high = axes.get_xlim() if named else axes.get_ylim()
    assert low <= 3 <= high  # the mark of the whole model
    if blocks == 0:  # and so no value of 0
        return
    crosses = axes.lines[0]
    places = crosses.get_ydata() if named else crosses.get_xdata()
    assert list(places) == [i for i, value in enumerate(values) if value == 0]
    assert (axes.get_xlabel() if named else axes.get_ylabel()) == "density, %"
    if named:
        assert [label.get_text() for label in axes.get_yticklabels()] == names


def test_values_that_are_all_zero_or_one_or_long_names() -> None:
    for values in ([0.0, 0.0], [100.0, 100.0], [1e-30, 0.0]):
        figure = draw_layers(["x" * 200, "b"], values, is_matrix=[True, True], title="t", label="%")
        assert_labels_apart(figure)


def test_inspect_draws_the_same_picture_every_time(tmp_path: Path) -> None:
    ff.top_k_mask({"w": torch.rand(30, 3), "b": torch.rand(3)}, k=9).save(tmp_path / "m")
    for name in ("one.png", "two.png"):
        command = ["inspect", str(tmp_path / "m"), "--png", str(tmp_path / name)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert f"{tmp_path / name} shows it" in result.stdout
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    image = imread(tmp_path / "one.png")
    assert image.shape[1] == 1350
    assert image.std() > 0.05
    result = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "none" / "x.png")])
    assert result.exit_code == 1
    assert "must exist; create it first" in result.stderr


@pytest.mark.parametrize("seeds", [1, 3])
def test_pictures_of_the_demo(seeds: int, tmp_path: Path) -> None:
    runs = {}
    layers = ["features.0.weight", "features.8.bias", "head.weight"]
    for place, method in enumerate(METHODS):
        densities = dict(zip(layers, (0.5 / (place + 1), 0.0, 1.0), strict=True))
        losses = [2.0, 1.0, 0.1 / (1 + place)]
        size = 312685 if place == 0 else 30000 // place
        runs[method.name] = [
            Run(90.0 - place + seed, 0.0, 449, size, 1, 1.0, losses, densities)
            for seed in range(seeds)
        ]
    files = draw_pictures(runs, tmp_path / "deep" / "folder")
    assert [file.name for file in files] == ["accuracy.png", "layers.png", "losses.png"]
    for file in files:
        assert imread(file).std() > 0.05
    from fishfast.demo import pictures

    for draw in (pictures._accuracy, pictures._layers, pictures._losses):
        assert_labels_apart(draw(runs))
    axes = pictures._losses(runs).axes[0]
    for line, method in zip(axes.lines, METHODS, strict=True):
        assert line.get_label() == method.name
        assert list(line.get_ydata()) == pytest.approx(runs[method.name][0].losses)
    marked = {line.get_label(): line for line in pictures._layers(runs).axes[0].lines}
    points = marked["mask of 2 %"].get_xdata()  # the third method
    assert points[0] == pytest.approx(50 / 3)
    assert points[2] == 100
    assert points[1] < 10  # none: left of the scale, whose smallest value is 12.5
    bars = pictures._accuracy(runs).axes[0].containers[0]
    fish = [place for place, method in enumerate(METHODS) if method.name.startswith("FISH")]
    assert list(bars.lines[0].get_ydata()) == [90 - p + (seeds - 1) / 2 for p in fish]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    ff.top_k_mask({"w": torch.rand(9)}, k=3).save(tmp_path / "m")
    for command in (
        ["inspect", str(tmp_path / "m"), "--png", str(tmp_path / "x.png")],
        ["demo", "--png", str(tmp_path)],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert 'which is not installed; run: pip install "fishfast[plot]"' in result.stderr
        assert result.stdout == ""
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "m")]).exit_code == 0


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys, fishfast.cli, fishfast.demo\n"
        "heavy = {'matplotlib', 'transformers', 'datasets', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
