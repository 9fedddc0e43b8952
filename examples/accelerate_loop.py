"""Train a FISH mask with Accelerate: your own loop, accumulation, clipping, exact resuming.

    accelerate launch examples/accelerate_loop.py             # BERT-base on SST-2
    accelerate launch examples/accelerate_loop.py --resume    # goes on where it was stopped
    python examples/accelerate_loop.py --smoke                # offline, on a CPU, seconds

The loop is that of Accelerate's own guide. `train_only` comes before `prepare`; `ff.AdamW` is
prepared like any optimizer, and so may be a scheduler. `save_state` writes the base model's keys,
the optimizer with its fp32 masters, the scheduler and the random states.

Needs: pip install fishfast accelerate transformers datasets
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import fishfast as ff


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Return the training and the validation batches."""
    if args.smoke:
        from tiny_bert import smoke_data

        data = smoke_data("sentences")
    else:
        data = load_dataset("nyu-mll/glue", "sst2")
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokens(rows: dict[str, list]) -> dict[str, list]:
        return {**tokenizer(rows["sentence"], truncation=True), "labels": rows["label"]}

    options: dict[str, Any] = {"batch_size": 8 if args.smoke else 32,
                               "collate_fn": DataCollatorWithPadding(tokenizer)}  # fmt: skip
    train, validation = (
        data[split].map(tokens, batched=True, remove_columns=data[split].column_names)
        for split in ("train", "validation")
    )
    return DataLoader(train, shuffle=True, **options), DataLoader(validation, **options)


def base_model(args: argparse.Namespace) -> nn.Module:
    """Return the pre-trained model; its new classifier is the same in every process."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32)


class Run:
    """A model, its mask, and everything that Accelerate prepares."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = Accelerator(
            gradient_accumulation_steps=2, mixed_precision=args.mixed_precision, cpu=args.smoke
        )
        if args.smoke and self.accelerator.num_processes > 1:
            raise SystemExit("--smoke is for one process; start it without accelerate launch")
        train, val = loaders(args)
        model = base_model(args).to(self.accelerator.device)
        # Every process scores the same samples; a run that is resumed makes the same mask again.
        count = min(1024, len(train.dataset))
        fisher = ff.estimate_fisher(model, train, num_samples=count, progress=True)
        mask = ff.top_k_mask(fisher, density=args.density, keep="classifier")
        self.tuned = ff.train_only(model, mask)
        optimizer = ff.AdamW(self.tuned.parameters(), lr=args.lr)
        steps = args.epochs * len(train) // 2  # Accelerate steps it once per process
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        self.model, self.optimizer, self.scheduler, self.train, self.val = self.accelerator.prepare(
            model, optimizer, falling, train, val
        )

    def fit(self, first_epoch: int = 0) -> None:
        """Train, and save the state after every epoch."""
        accelerator = self.accelerator
        main = accelerator.is_main_process
        for epoch in range(first_epoch, self.args.epochs):
            self.model.train()
            self.train.set_epoch(epoch)
            bar = tqdm(self.train, desc=f"epoch {epoch}", disable=not main)
            for batch in bar:
                with accelerator.accumulate(self.model):
                    loss = self.model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                bar.set_postfix(loss=f"{loss.item():.3f}")
            accelerator.save_state(str(Path(self.args.output) / f"epoch-{epoch}"))

    def resume(self, epoch: int) -> None:
        """Load the state after this epoch and train the rest."""
        self.accelerator.load_state(str(Path(self.args.output) / f"epoch-{epoch}"))
        self.fit(epoch + 1)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of right answers in percent, over all processes."""
        self.model.eval()
        right = [
            self.accelerator.gather_for_metrics(self.model(**b).logits.argmax(1) == b["labels"])
            for b in self.val
        ]
        return 100 * float(torch.cat(right).float().mean())


def same_bits(a: Run, b: Run) -> bool:
    """Return whether weights and optimizer states of two runs are equal."""
    ours, theirs = a.tuned.model.state_dict(), b.tuned.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and all(
        torch.equal(a.optimizer.state[p][key], value)
        for p, q in zip(a.tuned.parameters(), b.tuned.parameters(), strict=True)
        for key, value in b.optimizer.state[q].items()
    )


def main() -> None:
    """Train, save the delta and put it on the base."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="google-bert/bert-base-cased")
    parser.add_argument("--density", type=float, default=0.005, help="share of weights that train")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--mixed-precision", default="no", help="bf16, fp16 or no")
    parser.add_argument("--output", default="accelerate-out", help="folder for states and delta")
    parser.add_argument("--resume", action="store_true", help="from the last epoch saved")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on bundled data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            from tiny_bert import save_tiny_bert

            args.model, args.output = save_tiny_bert(Path(scratch) / "bert"), scratch
            args.density, args.epochs, args.lr = 0.5, 12, 1e-2
        run = Run(args)
        saved = [int(p.name[len("epoch-") :]) for p in Path(args.output).glob("epoch-*")]
        if args.resume and saved:
            run.resume(max(saved))
        else:
            run.fit()
        right = run.accuracy()
        if not run.accelerator.is_main_process:
            return
        run.tuned.print_trainable_parameters()
        if args.smoke:
            again = Run(args)
            again.resume(args.epochs // 2 - 1)
            same = "all bits as if never stopped" if same_bits(run, again) else "DIFFERENT"
            print(f"resumed after epoch {args.epochs // 2 - 1}: {same}")
        file = Path(args.output) / "delta.safetensors"
        ff.save_delta(run.tuned, file)
        base, trained = base_model(args), run.tuned.model.state_dict()
        ff.load_delta(file).apply_(base)
        same = all(torch.equal(v, trained[name].cpu()) for name, v in base.state_dict().items())
        print(
            f"accuracy {right:.2f} %; delta of {file.stat().st_size:,} bytes, on the base again: "
            f"{'all bits' if same else 'NO'}"
        )


if __name__ == "__main__":
    main()
