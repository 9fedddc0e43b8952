"""``fishfast score``: a tiny random model and a data set on disk, with nothing else to reach."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from delta_damage import truncate
from safetensors.torch import load_file, save_file

import fishfast as ff
from fishfast.cli import main
from fishfast.fisher.engine.scorer import Scorer
from fishfast.fisher.run import Run

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers", minversion="5")

WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "b", "c", "d", "e", "good", "bad", "film", "plot"]
LABELS = {"negative": 0, "positive": 1}
SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def rows(count: int = 7) -> list[dict[str, Any]]:
    names = list(LABELS)
    return [
        {"text": " ".join(WORDS[3 + (i * j) % 9] for j in range(1, 3 + i)), "label": names[i % 2]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    where = tmp_path_factory.mktemp("score")
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        **SMALL, label2id=LABELS, id2label={0: "negative", 1: "positive"}, hidden_dropout_prob=0.0
    )
    llama = transformers.LlamaConfig(**SMALL)
    t5 = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    for name, model in (
        ("bert", transformers.BertForSequenceClassification(bert)),
        ("bare", transformers.BertModel(bert)),
        ("llama", transformers.LlamaForCausalLM(llama)),
        ("t5", transformers.T5ForConditionalGeneration(t5)),
    ):
        model.save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    data = datasets.Dataset.from_list(rows())
    data.to_json(where / "rows.jsonl")
    data.to_csv(where / "rows.csv")
    data.to_parquet(where / "rows.parquet")
    data.save_to_disk(where / "rows")
    datasets.DatasetDict({"train": data, "few": data.select(range(2))}).save_to_disk(where / "two")
    return where


def score(model: Path, data: Path, *options: Any) -> Result:
    command = ["score", model, data, "--no-progress", *options]
    return CliRunner().invoke(main, [str(part) for part in command])


def succeeded(result: Result) -> Result:
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def by_hand(folder: Path, power: int = 2) -> dict[str, torch.Tensor]:
    """Sum the squares of one gradient after the other, of what transformers itself calls loss."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "bert").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows():
        tokens = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=12)
        model.zero_grad()
        model(**tokens, labels=torch.tensor([LABELS[row["label"]]])).loss.backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.abs() ** power
    return total


@pytest.mark.parametrize("data", ["rows", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_scores_are_those_of_a_loop_over_rows(data: str, folder: Path, tmp_path: Path) -> None:
    result = succeeded(
        score(folder / "bert", folder / data, "-o", tmp_path / "f", "--batch-size", 3)
    )
    fisher = ff.Fisher.load(tmp_path / "f")
    assert fisher.num_samples == 7
    assert "7 samples" in result.stdout
    for name, expected in by_hand(folder).items():
        torch.testing.assert_close(fisher[name], expected, rtol=1e-3, atol=1e-9)


def test_a_mask_beside_the_scores(folder: Path, tmp_path: Path) -> None:
    options = ["--density", 0.05, "--keep", "classifier", "--exclude", "bert.embeddings"]
    run = folder / "bert", folder / "rows", "-o", tmp_path / "f", "--mask", tmp_path / "m"
    result = succeeded(score(*run, *options))
    mask = ff.SparseMask.load(tmp_path / "m")
    fisher = ff.Fisher.load(tmp_path / "f")
    expected = ff.top_k_mask(fisher, density=0.05, keep="classifier", exclude="bert.embeddings")
    assert mask == expected
    assert repr(mask) in result.stdout


def test_the_order_is_drawn_from_the_seed(folder: Path, tmp_path: Path) -> None:
    """Of two rows of seven, not the first two unless asked for."""
    found = {}
    for name, options in (
        ("seed 1", ["--seed", 1]), ("again", ["--seed", 1]), ("seed 4", ["--seed", 4]),
        ("first", ["--no-shuffle"]), ("few", ["--no-shuffle", "--split", "few"]),
    ):  # fmt: skip
        data = folder / ("two" if "few" in name else "rows")
        succeeded(
            score(
                folder / "bert",
                data,
                "-o",
                tmp_path / "f",
                "--num-samples",
                2,
                "--batch-size",
                2,
                *options,
            )
        )
        found[name] = ff.Fisher.load(tmp_path / "f")["classifier.weight"]
    assert torch.equal(found["seed 1"], found["again"])
    assert torch.equal(found["first"], found["few"])
    assert not torch.equal(found["seed 1"], found["seed 4"])
    assert not torch.equal(found["seed 1"], found["first"])


def test_resumed_scores_equal_those_of_one_run(folder: Path, tmp_path: Path) -> None:
    options = ["--fisher-type", "sampled", "--num-label-samples", 2, "--batch-size", 2]
    run = folder / "bert", folder / "rows"
    succeeded(score(*run, "-o", tmp_path / "whole", *options))
    part = [*options, "--resume", tmp_path / "running"]
    succeeded(score(*run, "-o", tmp_path / "part", "--num-samples", 4, *part))
    succeeded(score(*run, "-o", tmp_path / "resumed", *part))
    whole, resumed = ff.Fisher.load(tmp_path / "whole"), ff.Fisher.load(tmp_path / "resumed")
    assert resumed.num_samples == whole.num_samples == 7
    assert resumed.passes["forward"] == whole.passes["forward"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_types_and_dtypes(folder: Path, tmp_path: Path) -> None:
    for options, kind in ((["--fisher-type", "exact"], "exact"), (["--dtype", "bfloat16"], "emp")):
        succeeded(score(folder / "bert", folder / "rows", "-o", tmp_path / "f", *options))
        fisher = ff.Fisher.load(tmp_path / "f")
        assert fisher.fisher_type.startswith(kind)
        assert fisher["classifier.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_language_models(name: str, folder: Path, tmp_path: Path) -> None:
    options = ["--label-column", "label", "--text-column", "text"] if name == "t5" else []
    options += ["--batch-size", 4, "--text-column", "text"] if name == "llama" else []
    succeeded(score(folder / name, folder / "rows", "-o", tmp_path / "f", *options))
    fisher = ff.Fisher.load(tmp_path / "f")
    kind = transformers.LlamaForCausalLM if name == "llama" else None
    kind = kind or transformers.T5ForConditionalGeneration
    model = kind.from_pretrained(folder / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
    weight = (
        model.lm_head.weight
        if name == "llama"
        else model.encoder.block[0].layer[0].SelfAttention.q.weight
    )
    own = next(n for n, p in model.named_parameters() if p is weight)
    total = torch.zeros_like(weight)
    for row in rows():
        tokens = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=12)
        labels = tokens["input_ids"]
        if name == "t5":
            labels = tokenizer(text_target=row["label"], return_tensors="pt")["input_ids"]
        model.zero_grad()
        model(**tokens, labels=labels).loss.backward()
        total += weight.grad.square()
    assert total.sum() > 0
    torch.testing.assert_close(fisher[own], total, rtol=1e-3, atol=1e-9)


def test_a_fresh_head_is_named_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    options = ["--architecture", "BertForSequenceClassification"]
    found = []
    for seed in (0, 0, 1):
        torch.rand(1)  # another state of torch's own generator
        result = succeeded(
            score(folder / "bare", folder / "rows", "-o", tmp_path / "f", "--seed", seed, *options)
        )
        assert "has no classifier.bias, classifier.weight: drawn at random, seed" in result.stderr
        found.append(ff.Fisher.load(tmp_path / "f")["classifier.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_pairs_of_texts_and_numbers_as_labels(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [{"one": "good film", "two": "a b", "gold": i % 2} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    options = ["--text-column", "one", "--text-column", "two", "--label-column", "gold"]
    succeeded(score(folder / "bert", path, "-o", tmp_path / "f", *options))
    fisher = ff.Fisher.load(tmp_path / "f")
    used = fisher["bert.embeddings.word_embeddings.weight"].sum(1) > 0
    assert {WORDS[i] for i in used.nonzero().flatten()} == {"good", "film", "a", "b"}


def bad_rows(tmp_path: Path, **entries: Any) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "a b", "label": 0} | entries))
    return path


BAD: dict[str, tuple[Any, list[str], str]] = {
    "label out of range": (
        {"label": 2}, [],
        "labels must be numbers from 0 to 1 or names of the model's config ('negative', 'positive')"
        "; row 0 has 2 in 'label'",
    ),
    "no label": ({"label": -1}, [], "row 0 has -1 in 'label'"),
    "unknown name": ({"label": "neutral"}, [], "row 0 has 'neutral' in 'label'"),
    "no text": ({"text": None, "other": "a"}, ["--text-column", "text"], "has None in 'text'"),
    "no token": ({"text": " "}, [], "texts must have tokens; row 0 has ' ' in 'text'"),
    "two texts": ({"more": "b"}, [], "those with strings: 'text', 'more'"),
    "three texts": (
        {"x": "a", "y": "b"},
        ["--text-column", "x", "--text-column", "y", "--text-column", "text"],
        "text_columns must be at most 2 for BertForSequenceClassification",
    ),
    "no such column": ({}, ["--text-column", "txt"], "must be of 'text', 'label'; got 'txt'"),
    "no such label column": ({}, ["--label-column", "y"], "one of 'text', 'label'; got 'y'"),
    "split of a file": ({}, ["--split", "train"], "a file has no splits"),
    "keep nothing": (
        {}, ["--mask", "m", "--density", "0.1", "--keep", "clasifier"],
        "keep entry 'clasifier' matches no parameter",
    ),
    "no folder": ({}, ["--resume", "/nowhere/f"], "the folder of '/nowhere/f' must exist"),
    "no architecture": ({}, ["--architecture", "BertForAnything"], "names 'BertForAnything'"),
    "no model": ({}, ["--architecture", "BertConfig"], "must be a model of transformers"),
    "no values": ({}, ["--device", "meta"], "device must be one that torch has here"),
    "another task": (
        {}, ["--architecture", "BertForMaskedLM"],
        "or an encoder-decoder of texts; got BertForMaskedLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_take_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    entries, options, text = BAD[name]
    data = bad_rows(tmp_path, **entries)
    result = score(folder / "bert", data, "-o", tmp_path / "f", *options)
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("Error: ")
    assert text in errors[0]
    assert not (tmp_path / "f").exists()


def test_missing_models_data_and_packages(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["-o", tmp_path / "f"]
    (tmp_path / "data.xyz").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "unlabelled.jsonl").write_text('{"text": "a"}')
    (tmp_path / "empty.csv").write_text("text,label\n")
    datasets.Dataset.from_dict({"text": [], "label": []}).save_to_disk(tmp_path / "empty rows")
    shutil.copytree(folder / "rows", tmp_path / "cut rows")
    (arrow,) = (tmp_path / "cut rows").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    for model, data, text in (
        ("none", "rows", "model must be a folder with a config.json"),
        ("bert", "none", "data must be a folder or file; there is no"),
        ("bert", "two", "split must be one of 'train', 'few'; got None"),
        ("bert", tmp_path / "data.xyz", "a file .jsonl, .json, .csv, .parquet, .txt; got"),
        ("bert", tmp_path / "broken.jsonl", "must be a .jsonl file with rows in it; '"),
        ("bert", tmp_path / "empty.jsonl", "data must have at least one row; '"),
        ("bert", tmp_path / "unlabelled.jsonl", "called label or labels; the dataset has 'text'"),
        ("bert", tmp_path / "empty.csv", "must be a .csv file with rows in it; '"),
        ("bert", tmp_path / "empty rows", "as save_to_disk writes it, with rows in it; '"),
        ("bert", tmp_path / "cut rows", "as save_to_disk writes it, with rows in it; '"),
        ("bert", tmp_path, "as save_to_disk writes it, with rows in it; '"),
    ):
        result = score(folder / model, folder / data, *out)
        assert result.exit_code == 1
        assert text in result.stderr
        assert len(result.stderr.splitlines()) == 1
    for package in ("datasets", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        result = score(folder / "bert", folder / "rows", *out)
        assert result.exit_code == 1
        assert f"needs {package}" in result.stderr
        assert 'pip install "fishfast[score]"' in result.stderr


def edit_weights(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["classifier.weight"] = torch.zeros(3, 16)
    save_file(state, model / "model.safetensors", {"format": "pt"})


MODEL_DAMAGE: dict[str, tuple[Any, str]] = {
    "no tokenizer": (  # of which transformers makes one that knows no word
        lambda model: [file.unlink() for file in model.glob("tokenizer*")],
        "must have its tokenizer beside it, as the tokenizer's save_pretrained writes it; there is "
        "no vocab.txt or tokenizer.json",
    ),
    "tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{}"),
        "the tokenizer of model '{model}' cannot be read: KeyError",
    ),
    "weights": (
        lambda model: truncate(model / "model.safetensors"),
        "the weights of model '{model}' cannot be read: SafetensorError",
    ),
    "other shape": (
        edit_weights,
        "the weights of model '{model}' must fit its config; 'classifier.weight' has shape (3, 16),"
        " and the config asks for (2, 16)",
    ),
    "config": (
        lambda model: (model / "config.json").write_text("{"),
        "the config of model '{model}' cannot be read: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_DAMAGE)
def test_damaged_models_take_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "bert", model)
    damage, text = MODEL_DAMAGE[name]
    damage(model)
    result = score(model, folder / "rows", "-o", tmp_path / "f")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert text.format(model=model) in line


def test_what_would_fail_after_hours_fails_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_it(*_: Any, **__: Any) -> None:
        raise AssertionError("the scoring has begun")

    monkeypatch.setattr(ff, "estimate_fisher", score_it)
    data, mask = folder / "rows", ["-o", tmp_path / "f", "--mask", tmp_path / "m", "--density"]
    for options, text in (
        ([*mask, 0.001, "--keep", "bert"], "k must cover the kept part; got k=2 for 2680 kept"),
        ([*mask, 0.9, "--exclude", "bert"], "must not exceed the weights that are not excluded"),
        (["-o", "/dev/null"], "'/dev/null' must be a regular file or not exist"),
        (["-o", tmp_path / ("f" * 300)], "File name too long: '"),
        (["-o", tmp_path / "f", "--device", "cuda:99"], "device must be one that torch has here"),
    ):
        result = score(folder / "bert", data, *options)
        assert result.exit_code == 1
        assert text in result.stderr
        assert len(result.stderr.splitlines()) == 1

    def refuse(path: Any, *_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("fishfast.files.atomic.os.open", refuse)
    for options in (["-o", tmp_path / "f"], ["-o", tmp_path / "f", "--resume", tmp_path / "r"]):
        result = score(folder / "bert", data, *options)
        assert result.stderr == f"Error: Permission denied: {str(tmp_path / 'f')!r}\n"
    assert not list(tmp_path.iterdir())


def test_control_c_leaves_what_the_next_run_needs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "bert", folder / "rows", "--batch-size", 2
    succeeded(score(*run, "-o", tmp_path / "whole"))
    add_batch, calls = Scorer.add_batch, []

    def stopped(self: Scorer, *arguments: Any) -> Any:
        calls.append(arguments)
        found = add_batch(self, *arguments)
        if len(calls) == 3:  # in the middle of the batch, as far as the run knows
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr("fishfast.fisher.run.Run.score", saving_at_once(Run.score))
    monkeypatch.setattr(Scorer, "add_batch", stopped)
    place = tmp_path / "running"
    result = score(*run, "-o", tmp_path / "f", "--resume", place)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == (
        f"{place} has scores to go on from: run the same command again\nStopped.\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "running"}
    assert ff.Fisher.load(place).num_samples == 4
    monkeypatch.setattr(Scorer, "add_batch", add_batch)
    succeeded(score(*run, "-o", tmp_path / "f", "--resume", place))
    whole, resumed = ff.Fisher.load(tmp_path / "whole"), ff.Fisher.load(tmp_path / "f")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    monkeypatch.setattr(Scorer, "add_batch", stopped)
    calls.clear()
    result = score(*run, "-o", tmp_path / "none")
    assert (result.exit_code, result.stderr) == (130, "Stopped.\n")
    assert not (tmp_path / "none").exists()


def saving_at_once(run: Any) -> Any:
    """Save running scores after each batch, not every minute."""

    def score_it(self: Run, *arguments: Any) -> None:
        if self.running is not None:
            self.running.every_seconds = 0
        run(self, *arguments)

    return score_it


def test_equal_runs_are_equal_files(folder: Path, tmp_path: Path) -> None:
    options = ["--mask", tmp_path / "m", "--density", 0.1]
    contents = set()
    for _ in range(2):
        succeeded(score(folder / "bert", folder / "rows", "-o", tmp_path / "f", *options))
        contents.add((tmp_path / "f").read_bytes() + (tmp_path / "m").read_bytes())
    assert len(contents) == 1


def test_outputs_are_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    data, weights = folder / "rows.jsonl", folder / "bert/model.safetensors"
    before = data.read_bytes(), weights.read_bytes()
    out, more = tmp_path / "f", ["--density", "0.5", "--mask"]
    for places in ([data], [weights], [out, *more, data], [out, "--resume", weights]):
        result = score(folder / "bert", data, "-o", *places)
        assert result.exit_code == 1
        assert "must not be its output too" in result.stderr
    for places in ([*more, out], ["--resume", out], [*more, tmp_path / "m", "--resume", out]):
        result = score(folder / "bert", data, "-o", out, *places)
        assert result.exit_code == 1
        assert "--out, --mask and --resume must be different files" in result.stderr
    assert (data.read_bytes(), weights.read_bytes()) == before
    assert not list(tmp_path.iterdir())


def test_more_samples_than_rows_are_all_rows(folder: Path, tmp_path: Path) -> None:
    run = folder / "bert", folder / "rows", "-o", tmp_path / "f", "--num-samples"
    assert succeeded(score(*run, 7)).stderr == ""
    result = succeeded(score(*run, 8))
    assert result.stderr == f"note: {folder / 'rows'} has 7 rows; all of them are scored\n"
    assert ff.Fisher.load(tmp_path / "f").num_samples == 7


def test_options_that_need_each_other(folder: Path, tmp_path: Path) -> None:
    for options in (["--mask", "m"], ["--density", "0.1"], ["--keep", "x"], ["--density", "0"]):
        result = score(folder / "bert", folder / "rows", "-o", tmp_path / "f", *options)
        assert result.exit_code == 2, options


def test_progress_is_shown_unless_it_is_not_wanted(folder: Path, tmp_path: Path) -> None:
    command = ["score", str(folder / "bert"), str(folder / "rows"), "-o", str(tmp_path / "f")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert "7/7" in result.stderr
    assert "samples/s" in result.stderr
    assert succeeded(score(folder / "bert", folder / "rows", "-o", tmp_path / "f")).stderr == ""
