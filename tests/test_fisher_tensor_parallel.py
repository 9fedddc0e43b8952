"""Models whose weights are DTensors: tensor parallelism over two processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fisher_checks import assert_as_exact_as_a_loop, truth
from models import Case, classify
from processes import enter_group, finish, leave_group, start
from torch import nn

import fishfast as ff

WORLD = 2
_GENERATOR = torch.Generator().manual_seed(8)
BATCHES = [
    (torch.randn(n, 6, generator=_GENERATOR), torch.randint(0, 4, (n,), generator=_GENERATOR))
    for n in (4, 2, 1)
]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)
    )


def case(model):
    made = Case(nn.Identity(), BATCHES, classify)
    made.model = model
    return made


def run(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    enter_group(rank, WORLD, folder)
    mesh = init_device_mesh("cpu", (WORLD,))
    model = plain()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    before = [getattr(p, "placements", None) for p in model.parameters()]
    fisher = ff.estimate_fisher(model, BATCHES, loss_fn=classify)
    assert [getattr(score, "placements", None) for score in fisher.values()] == before
    assert "scores: " in fisher.report()
    whole = {n: s.full_tensor() if hasattr(s, "placements") else s for n, s in fisher.items()}
    if rank == 0:
        torch.save({"scores": whole, "roads": fisher.roads}, f"{folder}/found.pt")
    dist.barrier()
    leave_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    finish(start(run, WORLD, str(folder)))
    return torch.load(folder / "found.pt", weights_only=True)


def test_weights_in_parts_are_scored_one_sample_at_a_time(found):
    whole, roads = found.values()
    fisher = ff.Fisher(whole, 7)
    exact, loop = truth(case(plain())), truth(case(plain()), torch.float32)
    assert_as_exact_as_a_loop(fisher, exact, loop)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert roads[name] == "one sample at a time: a DTensor, which has no rule"
    assert roads["4.weight"] == "batched"
