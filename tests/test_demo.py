"""`fishfast demo`, run small: its table, its promises about reloading, and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import fishfast as ff
from fishfast.cli import main
from fishfast.demo import METHODS, comparison, describe_choice, methods
from fishfast.demo.methods import GRID
from fishfast.demo.task import DigitNet, Task, fit, make_task, predict

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn")

NAMES = [
    "dense", "FISH 10 %", "FISH 2 %", "FISH 0.5 %",
    "random 10 %", "random 2 %", "random 0.5 %", "BitFit", "head only",
]  # fmt: skip


def demo(*options: str) -> Result:
    return CliRunner().invoke(main, ["demo", *options])


def table(output: str) -> dict[str, dict[str, str]]:
    """Parse the printed table: method -> heading -> cell, by the columns under the rule."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method "))
    ends, column = [], 0
    for rule in lines[start + 1].split():
        column = lines[start + 1].index(rule, column) + len(rule)
        ends.append(column)
    begins = [0, *ends[:-1]]

    def cells(line: str) -> list[str]:
        return [line[a:b].strip() for a, b in zip(begins, ends, strict=True)]

    rows = [cells(line) for line in lines[start + 1 : lines.index("", start)]]
    headings = cells(lines[start])
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows if "---" not in row[0]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output of a smoke run, and the folder with its files."""
    folder = tmp_path_factory.mktemp("demo")
    result = demo("--smoke", "--out", str(folder))
    assert result.exit_code == 0, result.output
    return result.stdout, folder / "seed-0"


@pytest.fixture(scope="module")
def task() -> Task:
    """What the smoke run trained on."""
    before = torch.get_num_threads()
    torch.set_num_threads(comparison.num_threads())
    try:
        return make_task(0, 1, lambda: None)
    finally:
        torch.set_num_threads(before)


def test_the_head_is_small_beside_the_smallest_mask() -> None:
    network = DigitNet()
    num_params = sum(p.numel() for p in network.parameters())
    num_head = sum(p.numel() for p in network.head.parameters())
    assert num_params >= 300_000
    assert num_head * 3 <= int(0.005 * num_params)


def test_table_has_every_method_and_its_budget(kept: tuple[str, Path]) -> None:
    output, folder = kept
    rows = table(output)
    assert list(rows) == NAMES
    num_params = sum(p.numel() for p in DigitNet().parameters())
    trained = {name: int(row["trained weights"].replace(",", "")) for name, row in rows.items()}
    assert trained["dense"] == num_params
    for kind in ("FISH", "random"):
        assert trained[f"{kind} 10 %"] == num_params // 10
        assert trained[f"{kind} 2 %"] == num_params // 50
        assert trained[f"{kind} 0.5 %"] == num_params // 200
    assert trained["head only"] == 325
    for method in METHODS:
        row, file = rows[method.name], folder / method.file
        assert int(row["delta bytes"].replace(",", "")) == file.stat().st_size
        assert row["reloaded %"] == row["accuracy %"].partition(" ")[0]
        assert float(row["lr"]) == method.lr
        assert method.lr in GRID
    assert "9 of 9" in output
    assert "torch " + torch.__version__ in output


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_kept_delta_gives_the_printed_accuracy(
    method: methods.Method, kept: tuple[str, Path], task: Task
) -> None:
    output, folder = kept
    network = DigitNet()  # its head is another one than the demo's
    network.features.load_state_dict(load_file(folder / "base.safetensors"))
    delta = ff.load_delta(folder / method.file)
    assert len(delta.mask["head.weight"]) == 320
    assert len(delta.mask["head.bias"]) == 5
    assert any("running_mean" in name for name in delta.buffers)
    delta.apply_(network)
    _, accuracy = predict(network, task.test)
    assert f"{accuracy:.2f}" == table(output)[method.name]["reloaded %"]


def test_pictures_are_beside_the_deltas_and_named(kept: tuple[str, Path]) -> None:
    pytest.importorskip("matplotlib")
    output, folder = kept
    assert f"The pictures are in {folder.parent}: accuracy.png, layers.png, losses.png." in output
    for name in ("accuracy", "layers", "losses"):
        assert (folder.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_kept_deltas_need_no_matplotlib(
    kept: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    runs = {method.name: [] for method in METHODS}
    monkeypatch.setattr("fishfast.demo.compare", lambda *_, **__: runs)
    monkeypatch.setattr("fishfast.demo.describe_comparison", lambda *_, **__: "table")
    runs["dense"] = [methods.Run(1.0, 1.0, 9, 9, 9, 1.0, [1.0], {})]
    result = demo("--out", str(tmp_path))
    assert result.exit_code == 0
    assert "No pictures: pictures need matplotlib" in result.stdout


def test_losses_are_those_before_each_step(task: Task) -> None:
    network = task.network()
    expected = []
    twin = task.network().train()
    for rows in torch.randperm(50, generator=task.order()).split(25):
        images = task.train[rows]
        expected.append(torch.nn.functional.cross_entropy(twin(images.pixels), images.labels))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    losses = fit(network, optimizer, task.train, 1, task.order(), lambda: None)
    assert losses == pytest.approx([sum(expected).item() / 2])


def test_repeat_gives_the_same_numbers_and_files(kept: tuple[str, Path], tmp_path: Path) -> None:
    output, folder = kept
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = demo("--smoke", "--out", str(tmp_path))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for heading in ("accuracy %", "reloaded %", "trained weights", "delta bytes"):
        assert [row[heading] for row in table(again.stdout).values()] == [
            row[heading] for row in table(output).values()
        ]
    for file in folder.iterdir():
        before, after = load_file(file), load_file(tmp_path / "seed-0" / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_task_is_stratified_and_disjoint(task: Task) -> None:
    assert task.train.labels.bincount().tolist() == [10] * 5
    assert len(task.train) + len(task.validation) + len(task.test) == 896
    rows = [
        {tuple(image.flatten().tolist()) for image in images.pixels}
        for images in (task.train, task.validation, task.test)
    ]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_other_seed_has_other_images_and_the_same_test_set(task: Task) -> None:
    other = make_task(1, 1, lambda: None)
    assert torch.equal(other.test.pixels, task.test.pixels)
    assert not torch.equal(other.train.pixels, task.train.pixels)


def test_reload_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ff.load_delta

    def damaged(path: Any) -> ff.Delta:
        delta = real(path)
        delta.values["head.bias"][0] += 1e-4  # too little to change the accuracy
        return delta

    monkeypatch.setattr(methods.ff, "load_delta", damaged)
    result = demo("--smoke", "--epochs", "1")
    assert result.exit_code == 1
    assert "Error: FISH 10 %: the reloaded network must equal the trained one" in result.output


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = demo("--smoke")
    assert result.exit_code == 1
    assert 'pip install "fishfast[demo]"' in result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seeds", "0"], "0 is not in the range x>=1"),
        (["--epochs", "-3"], "-3 is not in the range x>=1"),
        (["--epochs", "many"], "'many' is not a valid integer range"),
        (["--choose-lr", "--seeds", "2"], "drop --seeds and --out and --png"),
        (["--out", __file__], "is a file"),
        (["--colour"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 3 else "",
)
def test_bad_options(options: list[str], text: str) -> None:
    result = demo(*options)
    assert result.exit_code == 2
    assert text in result.output


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = demo("--smoke", "--out", str(tmp_path / "file" / "below"))
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_pictures_that_cannot_be_drawn_are_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: Any, **__: Any) -> None:
        raise AssertionError("the comparison has begun")

    monkeypatch.setattr("fishfast.demo.compare", compare)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "accuracy.png").mkdir(parents=True)
    for place, text in (
        (tmp_path / "file" / "below", "Not a directory: '"),
        (tmp_path / "taken", "accuracy.png' must be a regular file or not exist"),
    ):
        result = demo("--smoke", "--png", str(place))
        assert result.exit_code == 1
        assert text in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = demo("--smoke", "--png", str(tmp_path / "new"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: pictures need matplotlib")
    assert not (tmp_path / "new").exists()


def test_choice_of_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "CHOICE_SEEDS", (100,))
    monkeypatch.setattr(comparison, "METHODS", METHODS[-1:])
    result = comparison.choose_learning_rates(epochs=1, pretrain_epochs=1)
    assert list(result) == ["head only"]
    assert tuple(result["head only"]) == GRID
    assert all(0 < accuracy < 100 for accuracy in result["head only"].values())


def test_best_learning_rate_is_starred_and_the_smaller_one_on_a_tie() -> None:
    accuracies = {method.name: dict.fromkeys(GRID, 50.0) for method in METHODS}
    accuracies["BitFit"][GRID[2]] = 60.0
    lines = describe_choice(accuracies).splitlines()
    assert [line for line in lines if "60.00*" in line and line.startswith("BitFit")]
    dense = next(line for line in lines if line.startswith("dense"))
    assert dense.split()[1:3] == ["50.00*", "50.00"]


def test_python_dash_m_and_info() -> None:
    command = [sys.executable, "-m", "fishfast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fishfast, version {ff.__version__}\n"
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0
    assert "topk_mask" in result.output
