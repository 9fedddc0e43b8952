"""The example scripts, run as a user would; and their parts that a smoke run does not reach."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import HANG_GUARD

import fishfast as ff

os.environ.setdefault("HF_HUB_OFFLINE", "1")
EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [
    "glue.py", "cifar10.py", "lightning_module.py", "accelerate_loop.py", "distributed.py",
]  # fmt: skip
GLUE_NEEDS = ("transformers", "datasets", "accelerate", "sklearn", "scipy")
RESUMED = "all bits as if never stopped"


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip, by name, where one is missing. Nothing is imported: it takes seconds."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def smoke(folder: Path, script: str, *options: str) -> tuple[str, str]:
    """Run a script in an empty folder with no network; return what it printed."""
    package = str(Path(ff.__file__).parents[1])  # the one under test
    environment = {
        **os.environ, "PYTHONPATH": package, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--smoke", *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_GUARD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} <= {"cache"}, "a smoke run leaves nothing"
    return done.stdout, done.stderr


def table(printed: str) -> dict[str, list[str]]:
    """Return the rows under the last rule: method -> cells."""
    lines = printed.splitlines()
    last = max(i for i, line in enumerate(lines) if re.fullmatch(r"[- ]*---[- ]*", line))
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[last + 1 :] if line]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


# --- as a user runs them ---


@needs(*GLUE_NEEDS)
def test_glue(tmp_path: Path) -> None:
    printed, bars = smoke(tmp_path, "glue.py", "--method", "fish", "bitfit", "dense")
    rows = table(printed)
    assert list(rows) == ["fish", "bitfit", "dense"]
    for method in ("fish", "dense"):
        assert float(rows[method][0]) > 65  # guessing gives 50
    total = int(rows["dense"][1].replace(",", ""))
    trained = int(rows["fish"][1].replace(",", ""))
    assert trained == total // 2
    assert rows["fish"][3] == rows["bitfit"][3] == "all bits"
    assert f"trainable params: {trained:,} || all params: {total:,} || trainable%: 50.0" in printed
    assert "fisher: 100%" in bars
    for method in rows:  # correct answers of 16
        assert float(rows[method][0]) * 16 / 100 == int(float(rows[method][0]) * 16 / 100)


def test_cifar10(tmp_path: Path) -> None:
    printed, bars = smoke(
        tmp_path, "cifar10.py", "--method", "fish", "dense", "--warmup-epochs", "1",
        "--refresh-epochs", "2",
    )  # fmt: skip
    rows = table(printed)
    for method in ("fish", "dense"):
        assert float(rows[method][0]) > 40  # guessing gives 10
    total = int(rows["dense"][1].replace(",", ""))
    held = int(rows["fish"][1].replace(",", ""))
    assert total // 10 < held < 2 * total // 10  # the union of two masks of a tenth each
    assert rows["fish"][3] == "all bits"
    assert "fish: 100%" in bars


@needs("lightning", "transformers", "datasets")
def test_lightning_module(tmp_path: Path) -> None:
    printed, _ = smoke(tmp_path, "lightning_module.py")
    assert f"resumed at epoch=5.ckpt: {RESUMED}" in printed
    found = re.search(r"best epoch=\d+.ckpt: accuracy ([\d.]+) %; .* again: (.*)", printed)
    assert float(found[1]) > 65
    assert found[2] == "all bits"


@needs("accelerate", "transformers", "datasets")
def test_accelerate_loop(tmp_path: Path) -> None:
    printed, bars = smoke(tmp_path, "accelerate_loop.py")
    assert f"resumed after epoch 5: {RESUMED}" in printed
    found = re.search(r"accuracy ([\d.]+) %; .* again: (.*)", printed)
    assert float(found[1]) > 65
    assert found[2] == "all bits"
    assert "epoch 11: 100%" in bars


def test_distributed(tmp_path: Path) -> None:
    printed, _ = smoke(tmp_path, "distributed.py")
    assert "2 masks of" in printed
    assert "none in two" in printed
    assert "all workers hold the same bits: yes" in printed
    rounds = re.findall(
        r"alone ([\d.]+) %, united ([\d.]+) %; ([\d,]+) bytes .* ([\d,]+) for", printed
    )
    assert len(rounds) == 2
    assert float(rounds[-1][1]) > 25  # guessing gives 10
    sent, full = (int(text.replace(",", "")) for text in rounds[-1][2:])
    assert sent < full / 3


def test_readme_names_every_file_and_shows_what_is_printed() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"]({path.name})" in text
    assert {f"python examples/{s}" in text or f"launch examples/{s}" in text for s in SCRIPTS} == {
        True
    }
    assert RESUMED in text


# --- their parts ---


@needs(*GLUE_NEEDS)
def test_glue_saves_what_it_measured(examples: Any, tmp_path: Path) -> None:
    """The delta on a fresh base gives the printed number again, computed here from its words."""
    glue, tiny_bert = examples("glue"), examples("tiny_bert")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny_bert.save_tiny_bert(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = tiny_bert.smoke_data("pairs")
    args = argparse.Namespace(
        task="stsb", density=0.5, model=folder, num_samples=10, epochs=3, lr=1e-2, batch_size=4,
        bf16=False, seed=0, output=str(tmp_path), smoke=True,
    )  # fmt: skip
    collate = glue.DataCollatorWithPadding(tokenizer)
    data = glue.tokenized(pairs, glue.TASKS["stsb"], tokenizer)
    row = glue.run("fish", args, data, collate)
    assert row[0] == "fish"
    assert row[-1] == "all bits"

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    delta = ff.load_delta(tmp_path / "stsb-fish" / "delta.safetensors").apply_(base)
    moved = sum(int((v != before[n]).sum()) for n, v in delta.state_dict().items())
    num_params = sum(p.numel() for p in base.parameters())
    assert 0.4 * num_params < moved <= num_params // 2

    rows = pairs["validation"]
    words = tokenizer(rows["sentence1"][:], rows["sentence2"][:], return_tensors="pt", padding=True)
    with torch.no_grad():
        predictions = base(**words).logits[:, 0].double()
    labels = torch.tensor(rows["label"][:], dtype=torch.float64)
    x, y = predictions - predictions.mean(), labels - labels.mean()
    pearson = 100 * float(x @ y / math.sqrt(float(x @ x) * float(y @ y)))
    assert float(row[1]) == pytest.approx(pearson, abs=0.011)


@needs(*GLUE_NEEDS)
def test_glue_metrics_are_those_of_their_definitions(examples: Any) -> None:
    glue = examples("glue")
    labels = np.array([1, 0, 1, 1, 0, 1, 0, 0])
    guesses = np.array([1, 0, 0, 1, 1, 1, 0, 1])  # 3 true positives, 2 true negatives
    result = glue.EvalPrediction(np.stack([1.0 - guesses, guesses], 1), labels)
    tp, tn, fp, fn = 3, 2, 2, 1
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = {}
    for task in glue.TASKS.values():
        if task.num_labels > 1:
            found.update(glue.compute_metrics(task, result))
    assert found == pytest.approx(
        {"accuracy": 62.5, "f1": 100 * 2 * tp / (2 * tp + fp + fn), "matthews": 100 * matthews}
    )
    scores, guesses = np.array([0.0, 1.0, 2.0, 5.0]), np.array([[0.5], [0.0], [1.0], [9.0]])
    found = glue.compute_metrics(glue.TASKS["stsb"], glue.EvalPrediction(guesses, scores))
    x, y = scores - scores.mean(), guesses[:, 0] - guesses.mean()
    assert found["pearson"] == pytest.approx(100 * (x @ y) / math.sqrt((x @ x) * (y @ y)))
    ranks = 1 - 6 * (1 + 1 + 0 + 0) / (4 * 15)  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert found["spearman"] == pytest.approx(100 * ranks)


GLUE_COLUMNS = {
    "cola": ["sentence"], "mnli": ["premise", "hypothesis"], "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"], "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"], "sst2": ["sentence"], "stsb": ["sentence1", "sentence2"],
}  # fmt: skip


@needs(*GLUE_NEEDS)
@pytest.mark.parametrize("task", GLUE_COLUMNS)
def test_glue_reads_every_task(
    task: str, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows in the form of the data set on the hub, whose test split has no labels."""
    glue, tiny_bert = examples("glue"), examples("tiny_bert")
    from datasets import Dataset, DatasetDict

    rows = [
        {**dict.fromkeys(GLUE_COLUMNS[task], "The soup was warm."), "label": label, "idx": label}
        for label in range(2)
    ]
    names = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    hub = DatasetDict({split: Dataset.from_list(rows) for split in ["train", *names, "test"]})
    asked, seen = [], []
    monkeypatch.setattr(glue, "load_dataset", lambda *name: asked.append(name) or hub)
    monkeypatch.setattr(glue, "run", lambda *given: seen.append(given) or [given[0]])
    folder = tiny_bert.save_tiny_bert(tmp_path / "bert")
    monkeypatch.setattr(sys, "argv", ["glue.py", "--task", task, "--model", folder])
    glue.main()
    assert asked == [("nyu-mll/glue", task)]
    ((method, args, data, collate),) = seen
    assert (method, args.density, args.epochs, args.num_samples) == ("fish", 0.005, 7, 1024)
    assert list(data) == ["train", *names]
    batch = collate([data["train"][i] for i in range(2)])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [0, 1]
    words = 5 if len(GLUE_COLUMNS[task]) == 1 else 10  # and a full stop each
    assert batch["input_ids"].shape == (2, words + 1 + len(GLUE_COLUMNS[task]))


def test_cifar10_folder_is_read(examples: Any, tmp_path: Path) -> None:
    read = examples("cifar10_images").read_cifar10
    draw = np.random.default_rng(0)
    bytes_of = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels, labels = (
            draw.integers(0, 256, (3, 3072), dtype=np.uint8),
            [1, 2, int(draw.integers(10))],
        )
        bytes_of[name] = (pixels, labels)
        content = {b"data": pixels, b"labels": labels, b"batch_label": name.encode()}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    train, test = read(str(tmp_path))
    assert train.pixels.shape == (15, 3, 32, 32)
    assert train.labels.tolist() == [x for i in range(1, 6) for x in bytes_of[f"data_batch_{i}"][1]]
    pixels, labels = bytes_of["test_batch"]
    assert test.labels.tolist() == labels
    green = (float(pixels[2, 1024 + 5 * 32 + 7]) - 122.95) / 62.09  # row 5, column 7
    assert test.pixels[2, 1, 5, 7].item() == pytest.approx(green, rel=1e-5)


@needs("datasets", "PIL")
def test_cifar10_of_the_hub_is_read(examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = examples("cifar10_images").read_cifar10
    import datasets
    from PIL.Image import fromarray

    raw = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    columns = {"img": [fromarray(pixels) for pixels in raw], "label": [3, 1, 4, 1]}
    labels = datasets.ClassLabel(num_classes=10)
    kinds = datasets.Features({"img": datasets.Image(), "label": labels})
    split = datasets.Dataset.from_dict(columns, features=kinds)
    hub = datasets.DatasetDict({"train": split, "test": split})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"uoft-cs/cifar10": hub}[name])
    train, test = read("hub")
    assert train.labels.tolist() == test.labels.tolist() == [3, 1, 4, 1]
    blue = (float(raw[2, 5, 7, 2]) - 113.87) / 66.70
    assert train.pixels[2, 2, 5, 7].item() == pytest.approx(blue, rel=1e-5)


def test_cifar10_augmentation_shifts_and_flips(examples: Any) -> None:
    images = examples("cifar10_images")
    column = torch.arange(32.0).expand(1, 3, 32, 32)  # every pixel says which column it is from
    train = images.Images(column.repeat(64, 1, 1, 1), torch.arange(64))
    order = torch.Generator().manual_seed(0)
    (batch,) = images.shuffled(train, 64, order, augment=True)
    assert sorted(batch.labels.tolist()) == list(range(64))
    seen = set()
    for row in batch.pixels[:, 0, 0].tolist():
        assert max(abs(a - b) for a, b in zip(row, row[1:], strict=False)) == 1  # mirrored at ends
        seen.add((row[15] < row[16], row[15] if row[15] < row[16] else row[16]))
    assert {shift for up, shift in seen if up} == set(range(11, 20))
    assert len({up for up, _ in seen}) == 2
    (plain,) = images.shuffled(train, 64, order, augment=False)
    assert torch.equal(plain.pixels, train.pixels)


def test_cifar10_resnets_are_those_of_the_paper(examples: Any) -> None:
    resnet = examples("resnet").ResNet
    with torch.device("meta"):
        for blocks, layers in (((2, 2, 2, 2), 18), ((3, 4, 6, 3), 34)):
            net = resnet(blocks)
            around = [m for name, m in net.named_modules() if ".around.0" in name]
            weighty = [
                m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
            ]
            assert len(weighty) - len(around) == layers
    assert resnet((1, 1, 1, 1), 8)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
