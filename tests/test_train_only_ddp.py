"""The compact parameters under DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from processes import enter_group, finish, leave_group, start
from stepping import same_bits, state_of
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from train_only_modules import mask_over_all

import fishfast as ff


def ddp_net() -> tuple[nn.Module, ff.SparseTuning]:
    # Integers, so that the sum over the batch does not depend on how it is split.
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 5 - 2).view_as(parameter))
    return model, ff.train_only(model, mask_over_all(model, 0.5))


DDP_DATA = torch.arange(48).remainder(7).sub(3).float().view(8, 6)


def three_steps(
    run: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, share: int
) -> list[dict[str, Tensor]]:
    """Train and return the weights after each step; DDP averages over the ranks: so does share."""
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        (run(data).square().sum() / share).backward()
        optimizer.step()
        history.append(state_of(model))
    return history


def remasked(tuned: ff.SparseTuning, optimizer: torch.optim.Optimizer) -> None:
    """Take another mask, of other sizes, in which some of the old entries stay."""
    with tuned.released() as plain:
        mask = mask_over_all(plain, 0.3)
    tuned.remask(mask, optimizer=optimizer)


def wrapped(model: nn.Module, sent: list[int]) -> nn.Module:
    """Return the model in DDP, which appends the bytes of every bucket that it sends."""
    ddp = nn.parallel.DistributedDataParallel(model)

    def count_and_send(group, bucket):  # torch refuses annotations that are strings
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, count_and_send)
    return ddp


def ddp_worker(rank: int, folder: str) -> None:
    enter_group(rank, 2, folder)
    model, tuned = ddp_net()
    if rank == 1:  # the first rank's weights count
        with torch.no_grad():
            model[0]._parameters["weight"].add_(1.0)
    sent: list[list[int]] = [[], []]
    optimizer = ff.SGD(tuned.parameters(), lr=2.0**-10, momentum=0.5)
    data = DDP_DATA[rank::2]
    history = three_steps(wrapped(model, sent[0]), model, optimizer, data, share=1)
    remasked(tuned, optimizer)
    history += three_steps(wrapped(model, sent[1]), model, optimizer, data, share=1)
    torch.save((history, sent), f"{folder}/{rank}.pt")
    leave_group()


def test_two_ddp_ranks_equal_one_process_on_the_joined_batch(tmp_path: Any) -> None:
    """Before a remask and, wrapped again, after it; k numbers a step are on the wire."""
    workers = start(ddp_worker, 2, str(tmp_path))
    model, tuned = ddp_net()
    optimizer = ff.SGD(tuned.parameters(), lr=2.0**-10, momentum=0.5)
    counts = [tuned.num_selected]
    history = three_steps(model, model, optimizer, DDP_DATA, share=2)
    remasked(tuned, optimizer)
    counts.append(tuned.num_selected)
    history += three_steps(model, model, optimizer, DDP_DATA, share=2)
    finish(workers)
    (first, sent), (second, also_sent) = (
        torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)
    )
    assert counts[0] != counts[1]
    assert not same_bits(history[5]["0.weight"], history[2]["0.weight"])
    for name in history[0]:
        assert same_bits(first[0][name], history[0][name]), name  # exact in the first step
        for mine, other, alone in zip(first, second, history, strict=True):
            torch.testing.assert_close(mine[name], alone[name])
            assert same_bits(mine[name], other[name]), name
    for phases in (sent, also_sent):
        for buckets, k in zip(phases, counts, strict=True):
            assert sum(buckets) == 3 * 4 * k  # three steps of k fp32 gradients
