"""`process_group`: several processes, each with data of its own, get the scores of all of it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from fisher_checks import assert_same_state, state_of
from models import classify, mlp
from processes import enter_group, finish, leave_group, start
from torch import nn

import fishfast as ff

WORLD = 2
_GENERATOR = torch.Generator().manual_seed(12)
SIZES = [(4, 3), (2, 1, 4)]
BATCHES = [
    [
        (torch.randn(b, 6, generator=_GENERATOR), torch.randint(0, 4, (b,), generator=_GENERATOR))
        for b in sizes
    ]
    for sizes in SIZES
]


def first(model, batch):
    return model(batch[0])


def cases(rank, folder):
    """Return the options of a rank in each case."""
    own, sampled = BATCHES[rank], {"fisher_type": "sampled", "outputs_fn": first}
    return {
        "empirical": {"batches": own, "loss_fn": classify},
        "absolute": {"batches": own, "loss_fn": classify, "power": 1},
        "exact": {"batches": own, "fisher_type": "exact", "outputs_fn": first},
        "sampled": {"batches": own, **sampled, "seed": 0, "num_label_samples": 2},
        "some samples": {"batches": own, "loss_fn": classify, "num_samples": 3 + rank},
        "one without data": {"batches": own if rank == 0 else [], "loss_fn": classify},
        "resumed": {
            "batches": own, **sampled, "seed": 0,
            "resume_path": f"{folder}/running {rank}.safetensors",
        },
    }  # fmt: skip


class LoaderError(Exception):
    """What a broken loader raises."""


def broken(batches):
    yield batches[0]
    raise LoaderError("a bad disk")


def nan_losses(model, batch):
    return classify(model, batch) * torch.nan


def failures(rank):
    """Options with which one rank fails, or all do."""
    own = BATCHES[rank]
    good = {"batches": own, "loss_fn": classify}
    return {
        "a loader": good if rank == 0 else {**good, "batches": broken(own)},
        "losses": {**good, "loss_fn": nan_losses} if rank == 0 else good,
        "Ctrl-C": good if rank == 1 else {**good, "batches": interrupted(own)},
        "another power": {**good, "power": 1 + rank},
        "no data": {**good, "batches": []},
        "a folder": good if rank == 0 else {**good, "resume_path": "none/running"},
    }


def interrupted(batches):
    yield batches[0]
    raise KeyboardInterrupt


MESSAGES = {
    "a loader": [
        "ValueError: rank 1 of process_group failed; LoaderError: a bad disk",
        "LoaderError: a bad disk",
    ],
    "losses": [
        "ValueError: loss_fn must return finite losses; got nan for sample 0",
        "ValueError: rank 0 of process_group failed; ValueError: loss_fn must return finite "
        "losses; got nan for sample 0",
    ],
    "Ctrl-C": [
        "KeyboardInterrupt: ",
        "ValueError: rank 0 of process_group failed; KeyboardInterrupt: ",
    ],
    "another power": [
        "ValueError: every process must score the same parameters in the same way; power is 1 on "
        "rank 0 and 2 on rank 1"
    ] * 2,
    "no data": ["ValueError: batches must give at least one sample; got none"] * 2,
    "a folder": [
        "ValueError: rank 1 of process_group failed; FileNotFoundError: the folder of "
        "'none/running' must exist; create it first",
        "FileNotFoundError: the folder of 'none/running' must exist; create it first",
    ],
}  # fmt: skip


def the_model():
    torch.manual_seed(21)
    return mlp().model


def run(rank, folder):
    """One process: its results in files, its errors and what it found of itself in another."""
    enter_group(rank, WORLD, folder)
    group, model = dist.group.WORLD, the_model()
    before = state_of(model)
    for name, options in cases(rank, folder).items():
        found = ff.estimate_fisher(model, process_group=group, **options)
        found.save(f"{folder}/{name} {rank}.safetensors")
        assert_same_state(before, state_of(model))
    errors = {}
    for name, options in failures(rank).items():
        try:
            ff.estimate_fisher(model, process_group=group, **options)
        except (ValueError, LoaderError, OSError, KeyboardInterrupt) as error:
            errors[name] = f"{type(error).__name__}: {error}"
        assert_same_state(before, state_of(model))
    again = ff.estimate_fisher(model, process_group=group, **cases(rank, folder)["resumed"])
    again.save(f"{folder}/resumed again {rank}.safetensors")

    wrapped = nn.parallel.DistributedDataParallel(model)
    found = ff.estimate_fisher(wrapped, process_group=group, **cases(rank, folder)["empirical"])
    found.save(f"{folder}/wrapped {rank}.safetensors")
    alone = ff.estimate_fisher(wrapped, **cases(rank, folder)["empirical"])
    alone.save(f"{folder}/alone {rank}.safetensors")
    classify(wrapped, BATCHES[rank][0]).mean().backward()  # it trains as before
    gradients = [p.grad.flatten().tolist() for p in model.parameters()]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"errors": errors, "gradients": gradients}, file)
    leave_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Return where the processes have put what they found, and the rest of it by rank."""
    folder = tmp_path_factory.mktemp("group")
    finish(start(run, WORLD, str(folder)))
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def found_in(folder, name):
    return [ff.Fisher.load(folder / f"{name} {rank}.safetensors") for rank in range(WORLD)]


def assert_same_scores(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(score, other[name]) for name, score in one.items())


@pytest.mark.parametrize("name", cases(0, ""))
def test_every_process_gets_the_sum_of_all(group, tmp_path, name):
    folder, _ = group
    # A sum of two is the same in any order; each process adds its rank to the seed.
    parts = [
        ff.estimate_fisher(the_model(), **{**options, "seed": rank})
        for rank, options in enumerate(cases(rank, tmp_path)[name] for rank in range(WORLD))
        if options["batches"]
    ]
    expected = parts[0] + parts[1] if len(parts) == WORLD else parts[0]
    for found in found_in(folder, name):
        assert_same_scores(found, expected)
        assert (found.fisher_type, found.power) == (expected.fisher_type, expected.power)
        assert found.num_samples == expected.num_samples
        assert found.num_batches == expected.num_batches
        assert not found.fallback


@pytest.mark.parametrize("name", ["empirical", "exact"])
def test_one_process_with_all_the_data_gets_the_same(group, name):
    folder, _ = group
    options = {**cases(0, folder)[name], "batches": BATCHES[0] + BATCHES[1]}
    alone = ff.estimate_fisher(the_model(), **options)
    for found in found_in(folder, name):
        assert (found.num_samples, found.num_batches) == (14, 5)
        for parameter, score in alone.items():
            torch.testing.assert_close(found[parameter], score, rtol=1e-6, atol=0)


def test_a_finished_run_is_summed_again_from_its_files(group):
    """The files have what each process scored, before the sum: nothing is added twice."""
    folder, _ = group
    for again, before in zip(
        found_in(folder, "resumed again"), found_in(folder, "resumed"), strict=True
    ):
        assert_same_scores(again, before)
        assert again.num_samples == before.num_samples == 14
    files = [ff.Fisher.load(folder / f"running {rank}.safetensors") for rank in range(WORLD)]
    assert [f.num_samples for f in files] == [sum(sizes) for sizes in SIZES]


@pytest.mark.parametrize("name", MESSAGES)
def test_an_error_in_one_process_raises_in_all(group, name):
    _, answers = group
    assert [answer["errors"].get(name) for answer in answers] == MESSAGES[name]


def test_wrapped_in_distributed_data_parallel(group):
    folder, answers = group
    for found, bare in zip(found_in(folder, "wrapped"), found_in(folder, "empirical"), strict=True):
        assert_same_scores(found, bare)
    for rank, found in enumerate(found_in(folder, "alone")):
        assert_same_scores(
            found, ff.estimate_fisher(the_model(), BATCHES[rank], loss_fn=classify)
        )  # fmt: skip
    assert answers[0]["gradients"] == answers[1]["gradients"]
