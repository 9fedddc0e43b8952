"""Scores summed over processes: once, in few messages, and refused alike in all of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from processes import enter_group, finish, start

from fishfast.fisher import distributed
from fishfast.fisher.distributed import all_reduce_, announce_failure

SHAPES = {"b.weight": (13, 7), "a.bias": (5,), "scalar": (), "empty": (0, 3), "big": (100,)}


def scores_of(rank):
    """Quarters below 2**12: their sums over ranks are exact."""
    return {
        name: (torch.arange(math.prod(shape)).view(shape) % 1000 + 1000 * rank) / 4
        for name, shape in SHAPES.items()
    }


def case(name, rank):
    """What a rank scores, and the options of its call."""
    scores = scores_of(rank)
    options = {"counts": [rank + 1, 10, 2**40], "fisher_type": "exact", "power": 2}
    if name == "another order" and rank == 1:
        scores = dict(reversed(scores.items()))
    elif name == "another shape" and rank == 1:
        scores["a.bias"] = torch.zeros(6)
    elif name == "another name" and rank == 1:
        scores["more.weight"] = torch.zeros(6)
    elif name == "another power":
        options["power"] = 1 + rank % 2
    elif name == "another type":
        options["fisher_type"] = ["exact", "sampled", "exact"][rank]
    elif name == "another number of counts":
        options["counts"] = [1] * (1 + rank)
    return scores, options


SAME = ["same order", "another order"]
REFUSED = {
    "another shape": "'a.bias' has shape (5,) on rank 0 and (6,) on rank 1",
    "another name": "'more.weight' is scored on rank 1 only",
    "another power": "power is 1 on rank 0 and 2 on rank 1",
    "another type": "fisher_type is 'exact' on rank 0 and 'sampled' on rank 1",
    "another number of counts": "the counts differ in number on rank 0 and rank 1",
}
FAILED = "a failure"


def run(rank, world_size, folder):
    """One process: what it got in each case, or the text of its error."""
    enter_group(rank, world_size, folder)
    distributed._BUCKET = 48  # several messages, and pieces of one tensor in two of them
    messages = []
    inner = dist.all_reduce
    dist.all_reduce = lambda tensor, group: (
        messages.append(tensor.numel()), inner(tensor, group=group)
    )  # fmt: skip
    answers = {}
    for name in [*SAME, *REFUSED, FAILED, "same order again"]:
        scores, options = case(name, rank)
        messages.clear()
        answer = answers[name] = {}
        try:
            if name == FAILED and rank == 1:
                announce_failure(OSError("no disk"), scores, dist.group.WORLD)
            else:
                counts = options.pop("counts")
                answer["counts"] = all_reduce_(scores, counts, dist.group.WORLD, **options)
        except ValueError as error:
            answer["error"] = str(error)
        answer["messages"] = list(messages)
        torch.save(scores, f"{folder}/{name} {rank}.pt")
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(answers, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def group(request, tmp_path_factory):
    """The answers of every process, and where their scores are."""
    folder = tmp_path_factory.mktemp("group")
    finish(start(run, request.param, request.param, str(folder)))
    ranks = range(request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks], folder


@pytest.mark.parametrize("name", [*SAME, "same order again"])
def test_sums_over_processes(group, name):
    answers, folder = group
    ranks = range(len(answers))
    for rank, answer in enumerate(answers):
        assert answer[name]["counts"] == [
            sum(r + 1 for r in ranks), 10 * len(ranks), 2**40 * len(ranks)
        ]  # fmt: skip
        # 91 + 5 + 1 + 100 scores in messages of 48, then the counts.
        assert answer[name]["messages"] == [48, 48, 48, 48, 5, 3]
        found = torch.load(folder / f"{name} {rank}.pt", weights_only=True)
        for parameter in SHAPES:
            assert torch.equal(found[parameter], sum(scores_of(r)[parameter] for r in ranks))


@pytest.mark.parametrize("name", REFUSED)
def test_differences_are_refused_in_every_process(group, name):
    answers, folder = group
    text = "every process must score the same parameters in the same way; " + REFUSED[name]
    for rank, answer in enumerate(answers):
        assert answer[name] == {"error": text, "messages": []}
        found = torch.load(folder / f"{name} {rank}.pt", weights_only=True)
        assert all(torch.equal(found[n], score) for n, score in case(name, rank)[0].items())


def test_a_failure_is_raised_in_the_other_processes(group):
    for rank, answer in enumerate(group[0]):
        text = "rank 1 of process_group failed; OSError: no disk"
        error = {} if rank == 1 else {"error": text}
        assert answer[FAILED] == {**error, "messages": []}


def test_one_process_is_a_group_too(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        scores = scores_of(0)
        assert all_reduce_(scores, [3], dist.group.WORLD, fisher_type="empirical", power=1) == [3]
        assert all_reduce_({}, [], dist.group.WORLD, fisher_type="empirical", power=1) == []
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(scores[name], scores_of(0)[name]) for name in SHAPES)
