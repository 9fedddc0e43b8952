"""Train a FISH mask with PyTorch Lightning: clip, accumulate, checkpoint, resume, best model.

    python examples/lightning_module.py                  # BERT-base on SST-2
    python examples/lightning_module.py --resume         # goes on where it was stopped
    python examples/lightning_module.py --smoke          # offline, on a CPU, seconds

A LightningModule needs two lines of fishfast: `train_only` where it is made, and `ff.AdamW` over
`tuned.parameters()` in `configure_optimizers`. Lightning's checkpoints have the base model's keys
and the optimizer's state, with the fp32 masters of bf16 weights. Three things to know:

- `from_pretrained` gives a model in eval mode, and Lightning leaves modes alone: call train().
- Lightning does not save random states: here `EpochShuffle` and `on_train_epoch_start` give every
  epoch its own, so that a resumed run equals one that never stopped, bit for bit.
- For `precision="bf16-true"` convert the model before `train_only`: a delta knows its base's dtype.

Needs: pip install fishfast lightning transformers datasets
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import load_dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import fishfast as ff


class FishClassifier(L.LightningModule):
    """A transformers classifier of which only the masked weights train."""

    def __init__(self, model: nn.Module, mask: ff.SparseMask, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model.train(), lr
        self.tuned = ff.train_only(model, mask)

    def configure_optimizers(self) -> Any:
        """Hand Lightning an optimizer that writes the masked weights, and a schedule."""
        optimizer = ff.AdamW(self.tuned.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Draw each epoch's dropout from its own seed."""
        torch.manual_seed(self.current_epoch)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Return the loss; clipping and accumulation are the Trainer's."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Log loss and accuracy."""
        output = self.model(**batch)
        right = (output.logits.argmax(1) == batch["labels"]).float().mean()
        size = len(batch["labels"])
        self.log_dict({"val_loss": output.loss, "val_accuracy": right}, True, batch_size=size)


class EpochShuffle(Sampler[int]):
    """Another order in each epoch, known by its number alone; Lightning calls ``set_epoch``."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(self.size, generator=order).tolist()


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
                               "collate_fn": DataCollatorWithPadding(tokenizer),
                               "generator": torch.Generator()}  # fmt: skip
    train, validation = (
        data[split].map(tokens, batched=True, remove_columns=data[split].column_names)
        for split in ("train", "validation")
    )
    shuffled = EpochShuffle(len(train))
    return DataLoader(train, sampler=shuffled, **options), DataLoader(validation, **options)


def base_model(args: argparse.Namespace) -> nn.Module:
    """Return the pre-trained model, in the dtype that it is to train in."""
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    torch.manual_seed(0)  # of the new classifier
    return AutoModelForSequenceClassification.from_pretrained(args.model, dtype=dtype)


def make_module(args: argparse.Namespace, train: DataLoader) -> FishClassifier:
    """Return the module; a run that is resumed takes its mask from the file."""
    model, file = base_model(args), Path(args.output) / "mask.safetensors"
    if not (args.resume and file.exists()):
        num_samples = min(1024, len(train.dataset))
        fisher = ff.estimate_fisher(model, train, num_samples=num_samples, progress=True)
        ff.top_k_mask(fisher, density=args.density, keep="classifier").save(file)
    module = FishClassifier(model, ff.SparseMask.load(file), args.lr)
    module.tuned.print_trainable_parameters()
    return module


def make_trainer(args: argparse.Namespace) -> L.Trainer:
    """Return Lightning's Trainer as one would for any model."""
    keep = ModelCheckpoint(
        Path(args.output), "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True
    )
    return L.Trainer(
        max_epochs=args.epochs, precision=args.precision, gradient_clip_val=1.0,
        accumulate_grad_batches=2, callbacks=[keep], logger=False, log_every_n_steps=1,
        accelerator="cpu" if args.smoke else "auto",
    )  # fmt: skip


def check_resume(args: argparse.Namespace, through: FishClassifier, train: Any, val: Any) -> None:
    """Train the second half again from the checkpoint in the middle, and compare every bit."""
    module, trainer = make_module(args, train), make_trainer(args)
    middle = Path(args.output) / f"epoch={args.epochs // 2 - 1}.ckpt"
    trainer.fit(module, train, val, ckpt_path=middle)
    ours, theirs = module.state_dict(), through.state_dict()
    moments = (module.optimizers().state_dict(), through.optimizers().state_dict())
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs) and all(
        torch.equal(value, moments[1]["state"][p][key])
        for p, state in moments[0]["state"].items()
        for key, value in state.items()
    )
    print(f"resumed at {middle.name}: {'all bits as if never stopped' if same else 'DIFFERENT'}")


def main() -> None:
    """Train, load the best checkpoint, save its delta and put that on the base."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="google-bert/bert-base-cased")
    parser.add_argument("--density", type=float, default=0.005, help="share of weights that train")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--precision", default="32-true", help="bf16-mixed, bf16-true, ...")
    parser.add_argument("--output", default="lightning-out", help="folder for checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on bundled data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            from tiny_bert import save_tiny_bert

            args.model, args.output = save_tiny_bert(Path(scratch) / "bert"), scratch
            args.density, args.epochs, args.lr = 0.5, 12, 1e-2
        Path(args.output).mkdir(exist_ok=True)
        train, val = loaders(args)
        module, trainer = make_module(args, train), make_trainer(args)
        trainer.fit(module, train, val, ckpt_path="last" if args.resume else None)
        if args.smoke:
            check_resume(args, module, train, val)

        best = trainer.checkpoint_callback.best_model_path
        module.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
        module.model.eval()
        (found,) = trainer.validate(module, val, verbose=False)
        file = Path(args.output) / "best.safetensors"
        ff.save_delta(module.tuned, file)
        base, trained = base_model(args), module.model.state_dict()
        ff.load_delta(file).apply_(base)
        same = all(torch.equal(v, trained[name].cpu()) for name, v in base.state_dict().items())
        print(
            f"best {Path(best).name}: accuracy {100 * found['val_accuracy']:.2f} %; delta of "
            f"{file.stat().st_size:,} bytes, on the base again: {'all bits' if same else 'NO'}"
        )


if __name__ == "__main__":
    main()
