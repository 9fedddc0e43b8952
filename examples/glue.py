"""Fine-tune a transformers model on a GLUE task, with the Trainer, training 0.5 % of the weights.

    python examples/glue.py --task rte                       # FISH, 0.5 % of BERT-large
    python examples/glue.py --task rte --method fish random bitfit dense head
    python examples/glue.py --smoke                          # offline, on a CPU, seconds

Settings: Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks" (NeurIPS 2021)
and its authors' scripts: BERT-large (cased, whole word masking), 7 epochs, 128 tokens, batches of
16 (RTE: 8), AdamW at 5e-5, BitFit at rates of its own, dense at 1e-5, falling linearly to zero; the
empirical Fisher of 1024 training samples, 0.5 % of all weights, the new classifier among them.

Ours, not the paper's: scores on the validation set (theirs: GLUE's test server, after a search over
learning rates and batch sizes), and of MNLI the matched half only. "head" is our own floor.

Needs: pip install fishfast transformers datasets accelerate scikit-learn
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fishfast as ff

HEAD = "classifier"  # new and random: always trained, and charged to the budget
METHODS = ("fish", "random", "bitfit", "head", "dense")


class Task(NamedTuple):
    """A GLUE task: its columns, its metrics, and the learning rate that the authors gave BitFit."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    num_labels: int = 2  # 1: a number to predict
    bitfit_lr: float = 5e-4
    batch_size: int = 16


TASKS = {
    "cola": Task(("sentence",), ("matthews",), bitfit_lr=1e-3),
    "mnli": Task(("premise", "hypothesis"), num_labels=3, bitfit_lr=1e-3),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "qnli": Task(("question", "sentence"), bitfit_lr=1e-4),
    "qqp": Task(("question1", "question2"), ("f1", "accuracy")),
    "rte": Task(("sentence1", "sentence2"), batch_size=8),
    "sst2": Task(("sentence",)),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman"), num_labels=1),
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions)[0],
    "spearman": lambda labels, predictions: spearmanr(labels, predictions)[0],
}


def compute_metrics(task: Task, result: EvalPrediction) -> dict[str, float]:
    """Return the task's metrics, in percent."""
    logits = result.predictions
    predictions = logits[:, 0] if task.num_labels == 1 else logits.argmax(1)
    return {
        name: 100 * float(METRICS[name](result.label_ids, predictions)) for name in task.metrics
    }


def tokenized(data: dict[str, Dataset], task: Task, tokenizer: Any) -> dict[str, Dataset]:
    """Return the splits with the tokens and labels that the model takes, and nothing else."""

    def tokens(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[column] for column in task.columns]
        return {**tokenizer(*texts, truncation=True, max_length=128), "labels": rows["label"]}

    return {
        split: rows.map(tokens, batched=True, remove_columns=rows.column_names)
        for split, rows in data.items()
    }


def mask_for(
    method: str, model: nn.Module, data: Dataset, collate: Any, args: Any
) -> ff.SparseMask:
    """Choose the weights that a method trains."""
    if method == "bitfit":
        return ff.bias_mask(model, keep=HEAD)
    if method == "head":
        size = sum(p.numel() for n, p in model.named_parameters() if n.startswith(HEAD))
        return ff.random_mask(model, k=size, seed=0, keep=HEAD)  # the head uses up all k
    if method == "random":
        return ff.random_mask(model, density=args.density, seed=args.seed, keep=HEAD)
    # Padding changes no score: a sample's own tokens are what counts. So batch as you like.
    order = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate, generator=order)
    fisher = ff.estimate_fisher(
        model, loader, num_samples=min(args.num_samples, len(data)), progress=True
    )
    return ff.top_k_mask(fisher, density=args.density, keep=HEAD)


def run(method: str, args: argparse.Namespace, data: dict[str, Dataset], collate: Any) -> list:
    """Train one method, save what it learned, put that on a fresh base, and compare."""
    task, folder = TASKS[args.task], Path(args.output) / f"{args.task}-{method}"
    set_seed(args.seed)

    def base() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=task.num_labels, dtype=torch.float32
        )

    lr = args.lr or {"bitfit": task.bitfit_lr, "dense": 1e-5}.get(method, 5e-5)
    settings = TrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, eval_strategy="epoch",
        per_device_train_batch_size=args.batch_size or task.batch_size, learning_rate=lr,
        save_strategy="no", logging_strategy="epoch", report_to=[], seed=args.seed,
        bf16=args.bf16, use_cpu=args.smoke,
    )  # fmt: skip
    model = base().to(settings.device)
    optimizer: tuple[Any, dict] = (torch.optim.AdamW, {"lr": lr, "weight_decay": 0.0})
    if method != "dense":
        mask = mask_for(method, model, data["train"], collate, args)
        tuned = ff.train_only(model, mask)  # 1: freeze all but the mask
        tuned.print_trainable_parameters()
        optimizer = (ff.AdamW, {"lr": lr})  # 2: an optimizer that writes the masked weights
    trainer = Trainer(
        model=model, args=settings, train_dataset=data["train"],
        eval_dataset=data["validation_matched" if args.task == "mnli" else "validation"],
        data_collator=collate, compute_metrics=lambda result: compute_metrics(task, result),
        optimizer_cls_and_kwargs=optimizer,  # 3: hand it to the Trainer
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    scores = [f"{metrics[f'eval_{name}']:.2f}" for name in task.metrics]

    full = sum(value.nbytes for value in model.state_dict().values())
    if method == "dense":
        trainer.save_model()
        return [method, *scores, f"{sum(p.numel() for p in model.parameters()):,}", f"{full:,}", ""]
    file = folder / "delta.safetensors"
    ff.save_delta(tuned, file)
    again = base()  # with another random classifier, which the delta replaces
    ff.load_delta(file).apply_(again)
    trained = model.state_dict()
    same = all(torch.equal(value, trained[n].cpu()) for n, value in again.state_dict().items())
    size = file.stat().st_size
    print(f"{file.name}: {size:,} bytes; all weights: {full:,}")
    return [method, *scores, f"{tuned.num_selected:,}", f"{size:,}", "all bits" if same else "NO"]


def main() -> None:
    """Run the methods asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["fish"])
    parser.add_argument("--density", type=float, default=0.005, help="share of weights that train")
    parser.add_argument("--model", default="google-bert/bert-large-cased-whole-word-masking")
    parser.add_argument("--num-samples", type=int, default=1024, help="scored for the Fisher")
    parser.add_argument("--epochs", type=float, default=7)
    parser.add_argument("--lr", type=float, help="default: the authors', by method")
    parser.add_argument("--batch-size", type=int, help="default: 16; RTE 8")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="glue-out", help="folder for deltas")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on bundled data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            from tiny_bert import save_tiny_bert, smoke_data

            if args.task not in ("sst2", "stsb"):
                parser.error("--smoke has data in the form of sst2 and stsb only")
            args.model, args.output = save_tiny_bert(Path(scratch) / "bert"), scratch
            args.density, args.epochs, args.lr, args.batch_size = 0.5, 10, 5e-3, 8
            data = smoke_data("sentences" if args.task == "sst2" else "pairs")
        else:
            data = load_dataset("nyu-mll/glue", args.task)
            data = {split: rows for split, rows in data.items() if not split.startswith("test")}
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        data = tokenized(data, TASKS[args.task], tokenizer)
        collate = DataCollatorWithPadding(tokenizer)
        rows = [run(method, args, data, collate) for method in args.method]
    names = [f"{name} %" for name in TASKS[args.task].metrics]
    headers = ["method", *names, "trained weights", "bytes to keep", "on a fresh base"]
    align = ["left", *["right"] * (len(headers) - 1)]
    print(tabulate(rows, headers, disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
