"""Train with several workers on complementary masks that exchange deltas, not gradients.

    python examples/distributed.py --data cifar-10-batches-py --workers 4
    python examples/distributed.py --smoke               # two processes, drawn images, seconds

Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks" (NeurIPS 2021): workers
that train strictly complementary subsets of the weights need to hear from each other rarely. Here
every worker scores its own images (the scores are summed over processes), `split_mask` deals the
best weights out, each trains its share for a while on its own images, and writes a delta. Then all
put all deltas on their model: disjoint entries side by side, the classifier, which everyone
trains, as the mean. A delta is all that travels; a plain copy, the network or a queue would do.

Ours, not the paper's: which weights go to whom, a small net without BatchNorm (its statistics
would have to be averaged too), plain SGD, and workers that wait for each other.

Needs: pip install fishfast
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

# Its default arguments hold the group of the time of its import (an optimizer's first step imports
# it), whose threads would outlive destroy_process_group and may abort the process at its end.
import torch.distributed.nn  # noqa: F401
import torch.nn.functional as F
from cifar10_images import Images, drawn_images, read_cifar10, shuffled
from torch import Tensor, nn

import fishfast as ff

HEAD = "head"


class Net(nn.Sequential):
    """A small convolutional net of 0.4 M weights for images of 32 pixels."""

    def __init__(self, width: int = 64) -> None:
        torch.manual_seed(0)  # the same base in every process
        layers = []
        for inside, outside in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(inside, outside, 3, 2, 1), nn.GroupNorm(8, outside), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.add_module(HEAD, nn.Linear(4 * width, 10))


def losses(net: nn.Module, batch: Images) -> Tensor:
    """Return one loss per image."""
    return F.cross_entropy(net(batch.pixels), batch.labels, reduction="none")


@torch.no_grad()
def accuracy(net: nn.Module, images: Images) -> float:
    """Return the share of right answers in percent."""
    return 100 * float((net(images.pixels).argmax(1) == images.labels).float().mean())


@torch.no_grad()
def unite_(net: nn.Module, deltas: list[ff.Delta]) -> None:
    """Put all workers' weights on their common base; weights of several become their mean."""
    for name, weight in net.named_parameters():
        total, count = torch.zeros(weight.numel()), torch.zeros(weight.numel())
        for delta in deltas:
            if name in delta.values:
                where = delta.mask[name].long()
                total[where] += delta.values[name]
                count[where] += 1
        trained = count > 0
        weight.view(-1)[trained] = total[trained] / count[trained]


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Be one of the workers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.workers
    )
    if args.smoke:
        train, test = drawn_images(400, seed=0), drawn_images(100, seed=1)
    else:
        train, test = read_cifar10(args.data)
    own = Images(*(part[rank :: args.workers] for part in train))
    order = torch.Generator().manual_seed(rank)

    net = Net(args.width)
    fisher = ff.estimate_fisher(
        net, shuffled(own, 32, order, False), loss_fn=losses, process_group=dist.group.WORLD,
        num_samples=min(args.num_samples // args.workers, len(own.labels)),
    )  # fmt: skip
    masks = ff.split_mask(fisher, density=args.density, num_workers=args.workers, keep=HEAD)
    if rank == 0:
        together = torch.cat([m[n] for m in masks for n in m if not n.startswith(HEAD)])
        full = sum(value.nbytes for value in net.state_dict().values())
        print(
            f"{args.workers} masks of {masks[0].num_selected:,} weights; {len(together):,} "
            f"without the head, {'none in two' if disjoint(masks) else 'SOME IN TWO'}"
        )
    for round_ in range(args.rounds):
        tuned = ff.train_only(net, masks[rank])
        optimizer = ff.SGD(tuned.parameters(), lr=args.lr)
        for _ in range(args.epochs):
            for batch in shuffled(own, args.batch_size, order, augment=not args.smoke):
                optimizer.zero_grad()
                losses(net, batch).mean().backward()
                optimizer.step()
        alone = accuracy(net, test)
        ff.save_delta(tuned, Path(folder) / f"{round_}-{rank}.safetensors")
        tuned.release()
        dist.barrier()
        files = [Path(folder) / f"{round_}-{r}.safetensors" for r in range(args.workers)]
        unite_(net, [ff.load_delta(file) for file in files])
        if rank == 0:
            size = files[0].stat().st_size
            print(f"round {round_}: worker 0 alone {alone:.1f} %, united {accuracy(net, test):.1f} "
                  f"%; {size:,} bytes from each, {full:,} for all weights")  # fmt: skip
    bits = torch.cat([value.flatten().view(torch.int32) for value in net.state_dict().values()])
    found = [torch.empty_like(bits) for _ in range(args.workers)]
    dist.all_gather(found, bits)
    if rank == 0:
        same = all(torch.equal(bits, other) for other in found)
        print(f"all workers hold the same bits: {'yes' if same else 'NO'}")
    dist.destroy_process_group()


def disjoint(masks: list[ff.SparseMask]) -> bool:
    """Return whether no weight but the head's is in two masks."""
    for name in masks[0].shapes:
        found = torch.cat([mask[name] for mask in masks if name in mask] or [torch.empty(0)])
        if not name.startswith(HEAD) and len(found.unique()) < len(found):
            return False
    return True


def main() -> None:
    """Start the workers on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="hub", help="folder cifar-10-batches-py, or hub")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="over a worker's images, per round")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights per worker")
    parser.add_argument("--num-samples", type=int, default=1024, help="scored, over all workers")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--smoke", action="store_true", help="a smaller net on drawn images")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.batch_size, args.rounds, args.epochs = 16, 16, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, folder), nprocs=args.workers)


if __name__ == "__main__":
    main()
