"""Train a ResNet on CIFAR-10 from scratch, updating a fixed 10 % of its weights.

    python examples/cifar10.py --data cifar-10-batches-py    # the folder, or: --data hub
    python examples/cifar10.py --method fish random dense
    python examples/cifar10.py --refresh-epochs 1            # a new mask every epoch
    python examples/cifar10.py --smoke                       # drawn images, on a CPU, seconds

Settings: Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks" (NeurIPS 2021),
efficient checkpointing, and its authors' scripts: ResNet-34, 100 epochs, batches of 512, SGD at 0.4
with Nesterov momentum 0.9 and weight decay 5e-4, warmed up over 5 epochs; the mask from the
empirical Fisher of 1024 images at initialisation, 0.5, 2 or 10 % of the weights, the classifier
among them. The base can be made again from its seed, so a checkpoint is the delta alone.

Ours, not the paper's: the learning rate falls as a cosine (theirs: linearly), crop and flip without
cutout, and statistics of BatchNorm are measured before the first scoring, which is in eval mode.
Weight decay shrinks trained weights only. The authors' code decays all of them, so that those
outside its "fixed" mask fade to zero; here they keep their initial bits, which is another training.

Needs: pip install fishfast; for --data hub also datasets and pillow
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar10_images import Images, drawn_images, read_cifar10, shuffled
from resnet import ResNet
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fishfast as ff

HEAD = "head"
METHODS = ("fish", "random", "dense")


def losses(net: nn.Module, batch: Images) -> Tensor:
    """Return one loss per image, as `estimate_fisher` wants them."""
    return F.cross_entropy(net(batch.pixels), batch.labels, reduction="none")


@torch.no_grad()
def accuracy(net: nn.Module, images: Images) -> float:
    """Return the share of right answers in percent."""
    net.eval()
    right = sum(
        int((net(x).argmax(1) == y).sum())
        for x, y in zip(images.pixels.split(500), images.labels.split(500), strict=True)
    )
    return 100 * right / len(images.labels)


def make_mask(net: nn.Module, method: str, train: Images, args: Any, seed: int) -> ff.SparseMask:
    """Choose the weights to train: by their Fisher information, or at random."""
    if method == "random":
        return ff.random_mask(net, density=args.density, seed=seed, keep=HEAD)
    order = torch.Generator().manual_seed(seed)
    count = min(args.num_samples, len(train.labels))
    fisher = ff.estimate_fisher(
        net, shuffled(train, 64, order, augment=True), loss_fn=losses, num_samples=count
    )
    return ff.top_k_mask(fisher, density=args.density, keep=HEAD)


def run(method: str, train: Images, test: Images, args: argparse.Namespace) -> list[Any]:
    """Train one method, save what it learned, put that on the base again, and compare."""
    torch.manual_seed(args.seed)
    net = ResNet(args.blocks, args.width).to(train.pixels.device)
    order = torch.Generator().manual_seed(args.seed)
    tuned = None
    options = {"lr": args.lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), **options)

    bar = tqdm(range(args.epochs), desc=method)
    for epoch in bar:
        if method != "dense" and epoch == args.warmup_epochs:
            base = copy.deepcopy(net)
            with torch.no_grad():  # scoring is in eval mode: BatchNorm needs its statistics
                net.train()
                for batch in shuffled(train, args.batch_size, order, augment=True):
                    net(batch.pixels)
            tuned = ff.train_only(net, make_mask(net, method, train, args, args.seed))
            optimizer = ff.SGD(tuned.parameters(), **options)
        elif tuned and args.refresh_epochs and epoch % args.refresh_epochs == 0:
            with tuned.released() as plain:
                mask = make_mask(plain, method, train, args, args.seed + epoch)
            tuned.remask(mask, optimizer=optimizer)
        net.train()
        rise = min(1.0, (epoch + 1) / args.rise_epochs)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rise * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        for batch in shuffled(train, args.batch_size, order, augment=not args.smoke):
            loss = losses(net, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    right = f"{accuracy(net, test):.2f}"
    full = sum(value.nbytes for value in net.state_dict().values())
    if tuned is None:
        return [method, right, f"{sum(p.numel() for p in net.parameters()):,}", f"{full:,}", ""]
    file = Path(args.output) / f"cifar10-{method}.safetensors"
    held = ff.save_delta(tuned, file)  # with mask refresh: the union of all masks
    ff.load_delta(file).apply_(base)
    trained = net.state_dict()
    same = all(torch.equal(value, trained[name]) for name, value in base.state_dict().items())
    return [method, right, f"{held:,}", f"{file.stat().st_size:,}", "all bits" if same else "NO"]


def main() -> None:
    """Run the methods asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="hub", help="folder cifar-10-batches-py, or hub")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["fish"])
    parser.add_argument("--density", type=float, default=0.1, help="share of weights that train")
    parser.add_argument("--warmup-epochs", type=int, default=0, help="dense, before the mask")
    parser.add_argument(
        "--refresh-epochs", type=int, default=0, help="a new mask so often; 0: never"
    )
    parser.add_argument("--num-samples", type=int, default=1024, help="scored for the Fisher")
    parser.add_argument("--blocks", type=int, nargs=4, default=(3, 4, 6, 3))
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rise-epochs", type=int, default=5, help="to reach the learning rate")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=".", help="folder for deltas")
    parser.add_argument("--smoke", action="store_true", help="a small net on drawn images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            args.blocks, args.width, args.output = (1, 1, 1, 1), 8, scratch
            args.epochs, args.rise_epochs, args.batch_size, args.lr = 4, 1, 32, 0.1
            args.num_samples = 128
            train, test = drawn_images(200, seed=0), drawn_images(100, seed=1)
        else:
            train, test = read_cifar10(args.data)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            train, test = (Images(*(x.to(device) for x in images)) for images in (train, test))
        rows = [run(method, train, test, args) for method in args.method]
    headers = ["method", "accuracy %", "weights to keep", "bytes to keep", "on the base again"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 4))


if __name__ == "__main__":
    main()
