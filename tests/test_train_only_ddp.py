"""The compact parameters under DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from stepping import same_bits, state_of
from torch import nn
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


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model, tuned = ddp_net()
    if rank == 1:  # the first rank's weights count
        with torch.no_grad():
            model[0]._parameters["weight"].add_(1.0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = ff.SGD(tuned.parameters(), lr=2.0**-10, momentum=0.5)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(DDP_DATA[rank::2]).square().sum().backward()
        optimizer.step()
        history.append(state_of(model))
    torch.save(history, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ddp_ranks_equal_one_process_on_the_joined_batch(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=ddp_worker, args=(r, str(tmp_path))) for r in range(2)]
    for worker in workers:
        worker.start()
    model, tuned = ddp_net()
    optimizer = ff.SGD(tuned.parameters(), lr=2.0**-10, momentum=0.5)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        (model(DDP_DATA).square().sum() / 2).backward()  # DDP averages over the ranks
        optimizer.step()
        history.append(state_of(model))
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for name in history[0]:
        assert same_bits(first[0][name], history[0][name]), name  # exact in the first step
        torch.testing.assert_close(first[2][name], history[2][name])
        assert same_bits(first[2][name], second[2][name]), name
