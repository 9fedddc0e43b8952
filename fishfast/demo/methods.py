"""The methods that the demo compares, and one run of one of them: mask, train, save, reload."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fishfast as ff
from fishfast.demo.task import BATCH_SIZE, DigitNet, Images, Task, Tick, fit, predict

__all__ = ["BASE_FILE", "GRID", "METHODS", "Method", "ReloadMismatch", "Run", "check_reload", "run"]

# The new head is always in the mask and charged to k.
KEEP = ["head"]
BASE_FILE = "base.safetensors"
# Every method gets the best of these for itself; `fishfast demo --choose-lr` repeats the choice.
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


class ReloadMismatch(RuntimeError):
    """A saved delta, put on the base again, did not give the trained network."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: of the row.
        lr: the learning rate from `GRID` that was best for this method.
        mask: makes the mask for a network and a task; None trains every weight with torch's AdamW.
    """

    name: str
    lr: float
    mask: Callable[[DigitNet, Task], ff.SparseMask] | None

    @property
    def file(self) -> str:
        """Name of the file that a run saves, such as ``fish-0.5.safetensors``."""
        return self.name.removesuffix(" %").replace(" ", "-").lower() + ".safetensors"


def _losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, labels = batch
    return F.cross_entropy(network(pixels), labels, reduction="none")


def _fish(density: float) -> Callable[[DigitNet, Task], ff.SparseMask]:
    def mask(network: DigitNet, task: Task) -> ff.SparseMask:
        images = task.train
        batches = zip(images.pixels.split(BATCH_SIZE), images.labels.split(BATCH_SIZE), strict=True)
        fisher = ff.estimate_fisher(network, batches, loss_fn=_losses)
        return ff.top_k_mask(fisher, density=density, keep=KEEP)

    return mask


def _random(density: float) -> Callable[[DigitNet, Task], ff.SparseMask]:
    return lambda network, task: ff.random_mask(network, density=density, seed=task.seed, keep=KEEP)


def _bit_fit(network: DigitNet, task: Task) -> ff.SparseMask:
    return ff.bias_mask(network, keep=KEEP)


def _head_only(network: DigitNet, task: Task) -> ff.SparseMask:
    size = sum(parameter.numel() for parameter in network.head.parameters())
    return ff.random_mask(network, k=size, seed=0, keep=KEEP)  # k is used up by the head


METHODS = (
    Method("dense", 3e-3, None),
    Method("FISH 10 %", 1e-2, _fish(0.10)),
    Method("FISH 2 %", 3e-2, _fish(0.02)),
    Method("FISH 0.5 %", 1e-1, _fish(0.005)),
    Method("random 10 %", 1e-1, _random(0.10)),
    Method("random 2 %", 1e-1, _random(0.02)),
    Method("random 0.5 %", 1e-1, _random(0.005)),
    Method("BitFit", 3e-1, _bit_fit),
    Method("head only", 3e-1, _head_only),
)


@dataclass(frozen=True)
class Run:
    """What one run of one method gave.

    Attributes:
        accuracy: percent right on the judged images.
        reloaded: the same after the saved file was put on the pristine base.
        num_judged: how many images those were.
        num_trained: weights that were trained.
        file_bytes: size of the delta; for dense, of a whole state dict.
        seconds: scoring, masking and training.
        losses: mean training loss of each epoch.
        densities: parameter -> share of its weights that were trained, in the order of the network.
    """

    accuracy: float
    reloaded: float
    num_judged: int
    num_trained: int
    file_bytes: int
    seconds: float
    losses: Sequence[float]
    densities: Mapping[str, float]


def run(method: Method, task: Task, *, epochs: int, judge: Images, folder: Path, tick: Tick) -> Run:
    """Train one method on one task, save what it learned, and reload it onto the pristine base.

    Args:
        method: what to train, and with which learning rate.
        task: base and images.
        epochs: passes over the training images.
        judge: the images on which accuracy is measured.
        folder: has the base in `BASE_FILE`, and gets the method's own file.
        tick: called after each epoch.

    Returns:
        What the table is made of.

    Raises:
        ReloadMismatch: a logit differs after the reload.
    """
    network, path = task.network(), folder / method.file
    reloaded = task.pristine(folder / BASE_FILE)
    start = time.perf_counter()
    if method.mask is None:
        parameters = list(network.parameters())
        dense = torch.optim.AdamW(parameters, lr=method.lr, weight_decay=0.0)
        losses = fit(network, dense, task.train, epochs, task.order(), tick)
        seconds = time.perf_counter() - start
        num_trained = sum(parameter.numel() for parameter in parameters)
        densities = {name: 1.0 for name, _ in network.named_parameters()}
        save_file(network.state_dict(), path)
        reloaded.load_state_dict(load_file(path))
    else:
        tuned = ff.train_only(network, method.mask(network, task))
        sparse = ff.AdamW(tuned.parameters(), lr=method.lr)
        losses = fit(network, sparse, task.train, epochs, task.order(), tick)
        seconds = time.perf_counter() - start
        num_trained = tuned.num_selected
        densities = {
            name: len(found) / prod(tuned.mask.shapes[name]) for name, found in tuned.mask.items()
        }
        ff.save_delta(tuned, path)
        ff.load_delta(path).apply_(reloaded)
    accuracy, accuracy_reloaded = check_reload(method.name, network, reloaded, judge)
    return Run(
        accuracy=accuracy,
        reloaded=accuracy_reloaded,
        num_judged=len(judge),
        num_trained=num_trained,
        file_bytes=path.stat().st_size,
        seconds=seconds,
        losses=losses,
        densities=densities,
    )


def check_reload(
    name: str, trained: nn.Module, reloaded: nn.Module, images: Images
) -> tuple[float, float]:
    """Compare a trained network with its reloaded copy, bit for bit.

    Args:
        name: of the method, for the message.
        trained: the network that was saved.
        reloaded: a pristine base with the saved file on it.
        images: what both are shown.

    Returns:
        The accuracy of each, in percent.

    Raises:
        ReloadMismatch: any logit differs.
    """
    logits, accuracy = predict(trained, images)
    logits_again, accuracy_again = predict(reloaded, images)
    if accuracy != accuracy_again or not torch.equal(logits, logits_again):
        largest = float((logits - logits_again).abs().max())
        raise ReloadMismatch(
            f"{name}: the reloaded network must equal the trained one; accuracy {accuracy:.4f} % "
            f"became {accuracy_again:.4f} %, logits differ by up to {largest:.3g}"
        )
    return accuracy, accuracy_again
