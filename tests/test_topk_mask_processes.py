"""`top_k_mask(process_group=)`: any number of processes get the mask of one, in their own rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import VALUES
from processes import enter_group, finish, start
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fishfast as ff
from fishfast.mask.selection.cpu import CpuPasses

WORLDS = [1, 2, 3, 4]
SHAPES = {"z": (23, 11), "a.bias": (7,), "empty": (0, 3), "a.weight": (3, 4, 50), "head": (5, 2)}
RULES = {
    "one": {"k": 1},
    "some": {"k": 77},
    "half": {"density": 0.5},
    "all": {"density": 1.0},
    "kept": {"k": 90, "keep": ["head"]},
    "excluded": {"density": 0.3, "exclude": ["z", "head"]},
    "layers": {"density": 0.2, "scope": "layer", "keep": "a.bias"},
    "torch": {"k": 300, "backend": "torch"},
}


def model_scores(make, dtype=torch.float32):
    torch.manual_seed(3)
    return {name: make(math.prod(s)).view(s).to(dtype) for name, s in SHAPES.items()}


MODELS = {
    **{
        value.id: model_scores(value.values[0])
        for value in VALUES
        if value.id in ("random", "few-values", "all-zero", "one-bin", "infinities")
    },
    "bf16": model_scores(VALUES[1].values[0], torch.bfloat16),
}
DTENSORS = ["few-values", "all-zero", "bf16"]


def bounds(name, world):
    """Where each rank's rows of a tensor start and end: uneven, some empty."""
    rows = SHAPES[name][0]
    random = torch.Generator().manual_seed(len(name) + 10 * world)
    cuts = torch.randint(0, rows + 1, (world - 1,), generator=random).sort().values.tolist()
    return list(zip([0, *cuts], [*cuts, rows], strict=True))


def shard(scores, rank, world):
    return {name: score[slice(*bounds(name, world)[rank])] for name, score in scores.items()}


def as_dtensors(scores, rank, group, placements):
    mesh = DeviceMesh.from_group(group, "cpu")
    found = {}
    for name, score in scores.items():
        placement = placements.get(name, Shard(0))
        whole = not isinstance(placement, Shard)
        # As fully_shard does it: chunks of equal size, the last ones shorter or empty.
        chunks = score.chunk(mesh.size()) if len(score) else [score] * mesh.size()
        own = score if whole else (chunks[rank] if rank < len(chunks) else score[:0])
        found[name] = DTensor.from_local(
            own, mesh, [placement], run_check=False, shape=score.shape, stride=score.stride()
        )
    return found


def broken(kind, rank, folder):
    """What a rank passes when rank 1 is at fault, or the two do not agree."""
    scores, rules = shard(MODELS["random"], rank, 3), {"k": 5}
    other = rank == 1
    if kind == "nan":
        scores["a.weight"] = torch.full((2, 4, 50), torch.nan if other else 1.0)
    elif kind == "negative, kept":
        scores["head"], rules = torch.full((1, 2), -1.0 if other else 1.0), {"k": 9, "keep": "head"}
    elif kind == "dtype" and other:
        scores["head"] = scores["head"].double()
    elif kind == "another dtype" and other:
        scores["head"] = scores["head"].bfloat16()
    elif kind == "name" and other:
        scores["more"] = torch.rand(3)
    elif kind == "order" and other:
        scores = dict(reversed(scores.items()))
    elif kind == "rows" and other:
        scores["z"] = torch.rand(4, 12)
    elif kind == "k":
        rules = {"k": 5 + other}
    elif kind == "scope" and other:
        rules = {"k": 5, "scope": "layer"}
    elif kind == "rule" and other:
        rules = {"k": 5, "exclude": "z"}
    elif kind == "scalar":
        scores["scalar"] = torch.tensor(1.0)
    elif kind == "no mapping" and other:
        scores = None
    elif kind == "k out of range":
        rules = {"k": 914}
    elif kind == "file":
        path = f"{folder}/{rank} shorter.safetensors"
        save_file(scores, path)
        scores = ff.open_scores(path)
        if other:
            with open(path, "r+b") as file:
                file.truncate(400)
    elif kind == "Ctrl-C" and other:
        scores = Interrupted(scores)
    return scores, rules


class Interrupted(dict):
    """A mapping on which the user has pressed Ctrl-C."""

    def items(self):
        raise KeyboardInterrupt


REFUSED = {
    "nan": "scores must be >= 0 and not NaN; got nan at flat index 0 of 'a.weight'",
    "negative, kept": "scores must be >= 0 and not NaN; got -1.0 at flat index 0 of 'head'",
    "dtype": "scores must be dense float32, bfloat16 or float16 tensors; got torch.float64 for "
    "'head'",
    "no mapping": "scores must be a mapping of names to tensors; got NoneType",
    "file": "has changed since it was opened",
    "Ctrl-C": "",
}
SAME_IN_ALL = {
    "another dtype": "by the same rules; scores: 'head' of torch.float32 in rows (2,) on rank 0 is "
    "'head' of torch.bfloat16 in rows (2,) on rank 1",
    "name": "scores: 'more' of torch.float32 in rows () is on rank 1 only",
    "order": "scores: 'z' of torch.float32 in rows (11,) on rank 0 is 'head' of torch.float32",
    "rows": "'z' of torch.float32 in rows (11,) on rank 0 is 'z' of torch.float32 in rows (12,)",
    "k": "every process must select from the same parameters by the same rules; k is '5' on rank 0 "
    "and '6' on rank 1",
    "scope": "scope is \"'global'\" on rank 0 and \"'layer'\" on rank 1",
    "rule": "eligible: z on rank 0 is a.bias on rank 1",
    "scalar": "'scalar' is a scalar, which has none; give a DTensor placed as Replicate()",
    "k out of range": "k must be from 1 to the number of weights, 870; got 914",
}
BAD_PLACEMENTS = {"columns": Shard(1), "partial": Partial()}


def run(rank, folder):
    """One of four processes: its masks in groups of the first 1, 2, 3 and 4."""
    enter_group(rank, 4, folder)
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    sent = []
    for call in ("all_reduce", "all_gather"):
        count_bytes(call, sent)
    found, traffic, errors = {}, {}, {}

    def select(key, group, scores, **rules):
        sent.clear()
        mask = ff.top_k_mask(scores, process_group=group, **rules)
        found[key] = dict(mask), mask.shapes, mask.num_zero_score
        traffic[key] = sum(sent)

    def refused(key, group, scores, **rules):
        try:
            select(key, group, scores, **rules)
        except (ValueError, TypeError, KeyboardInterrupt) as error:
            errors[key] = f"{type(error).__name__}: {error}"

    for world, group in groups.items():
        if rank >= world:
            continue
        for model, scores in MODELS.items():
            for rule, rules in RULES.items():
                select((world, model, rule), group, shard(scores, rank, world), **rules)
        for model in DTENSORS:
            placements = {"a.bias": Replicate(), "head": Replicate()}
            pieces = as_dtensors(MODELS[model], rank, group, placements)
            for rule in ("some", "kept", "layers", "all"):
                select((world, model, rule, "dtensor"), group, pieces, **RULES[rule])
        own = shard(MODELS["few-values"], rank, world)
        save_file(own, f"{folder}/{rank}.safetensors")
        stored = ff.open_scores(f"{folder}/{rank}.safetensors")
        select((world, "few-values", "stored"), group, {n: stored[n] for n in own}, k=250)
        tiny = {f"t{i}": torch.rand(2, 3) for i in range(3000)}
        select((world, "tiny", "traffic"), group, tiny, density=0.1)
        big = {f"t{i}": torch.rand(300_000) for i in range(3)}
        select((world, "big", "traffic"), group, big, density=0.1)
    if rank < 3:
        for kind in [*REFUSED, *SAME_IN_ALL]:
            scores, rules = broken(kind, rank, folder)
            refused(kind, groups[3], scores, **rules)
        for kind, placement in BAD_PLACEMENTS.items():
            pieces = as_dtensors(MODELS["random"], rank, groups[3], {"z": placement})
            refused(kind, groups[3], pieces, k=5)
        copies = dict(MODELS["random"])
        if rank == 1:
            copies["head"] = torch.full_like(copies["head"], torch.nan)
        copies = as_dtensors(copies, rank, groups[3], {"head": Replicate()})
        refused("copies", groups[3], copies, k=500)
        passes = CpuPasses.emit
        CpuPasses.emit = fails_on_one
        pieces = shard(MODELS["random"], rank, 3)
        refused("emission", groups[3], pieces, k=77, scope="layer", backend="cpu")
        CpuPasses.emit = passes
        select((3, "random", "numpy"), groups[3], pieces, k=np.int64(77) if rank == 1 else 77)
        elsewhere = as_dtensors(MODELS["random"], rank, groups[3], {})
        if rank < 2:
            refused("elsewhere", groups[2], elsewhere, k=5)
        refused("no group", None, elsewhere, k=5)
        refused("not a group", "world", {}, k=5)
        select((3, "random", "after errors"), groups[3], shard(MODELS["random"], rank, 3), k=77)
    torch.save((found, traffic, errors), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def fails_on_one(self, ties, outputs):
    if dist.get_rank() == 1:
        raise ValueError("the file ends here")


def count_bytes(call, sent):
    inner = getattr(dist, call)

    def counting(*arguments, **options):
        message = arguments[-1]
        sent.append(message.numel() * message.element_size())
        return inner(*arguments, **options)

    setattr(dist, call, counting)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return what each rank has found, sent and been refused."""
    folder = tmp_path_factory.mktemp("group")
    finish(start(run, 4, str(folder)))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


def put_together(answers, key, starts):
    """Return every rank's indices, moved to where its rows start, tensor by tensor."""
    parts = [answers[rank][0][key] for rank in range(key[0])]
    whole = {
        name: torch.cat([
            part[0][name].long() + start * math.prod(SHAPES[name][1:])
            for part, start in zip(parts, starts(name), strict=True)
        ])
        for name in SHAPES
    }  # fmt: skip
    return whole, sum(part[2] for part in parts)


def assert_same(whole, num_zero, expected):
    assert {name: found.tolist() for name, found in whole.items()} == {
        name: found.tolist() for name, found in expected.items()
    }
    assert num_zero == expected.num_zero_score


@pytest.mark.usefixtures("simulated")
def test_the_cuda_kernels_select_for_one_process_only(monkeypatch):
    """Over processes "auto" runs the torch passes on a card; the kernels by name are refused."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rules = {"k": 77, "process_group": dist.group.WORLD}
        with pytest.raises(ValueError, match="selects from the scores of one process; with proc"):
            ff.top_k_mask(MODELS["random"], backend="simulated", **rules)
        kernels = lambda *_: pytest.fail("the kernels were called")  # noqa: E731
        monkeypatch.setattr("fishfast.mask.selection.plan.select_cuda", kernels)
        monkeypatch.setattr("fishfast._backend.choose", lambda *_: "cuda")
        mask = ff.top_k_mask(MODELS["random"], **rules)
    finally:
        dist.destroy_process_group()
    monkeypatch.undo()
    assert mask == ff.top_k_mask(MODELS["random"], k=77, backend="torch")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_the_masks_put_together_are_that_of_one_process(answers, model, world):
    for rule, rules in RULES.items():
        starts = lambda name: [start for start, _ in bounds(name, world)]  # noqa: E731
        found = put_together(answers, (world, model, rule), starts)
        assert_same(*found, ff.top_k_mask(MODELS[model], **rules))


@pytest.mark.parametrize("world", WORLDS)
def test_shapes_and_indices_are_local(answers, world):
    for rank in range(world):
        indices, shapes, _ = answers[rank][0][world, "random", "half"]
        own = shard(MODELS["random"], rank, world)
        assert shapes == {name: tuple(score.shape) for name, score in own.items()}
        assert list(indices) == list(own)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", DTENSORS)
def test_dtensors_with_replicated_ones_counted_once(answers, model, world):
    replicated = ("a.bias", "head")
    for rule in ("some", "kept", "layers", "all"):
        key = (world, model, rule, "dtensor")
        expected = ff.top_k_mask(MODELS[model], **RULES[rule])
        for name in SHAPES:
            own = [answers[rank][0][key][0][name] for rank in range(world)]
            if name in replicated:
                assert all(torch.equal(found, expected[name]) for found in own)
                continue
            chunk = -(-SHAPES[name][0] // world) * math.prod(SHAPES[name][1:])
            moved = torch.cat([found + rank * chunk for rank, found in enumerate(own)])
            assert torch.equal(moved, expected[name])


@pytest.mark.parametrize("world", WORLDS)
def test_scores_in_a_file_of_each_process(answers, world):
    starts = lambda name: [start for start, _ in bounds(name, world)]  # noqa: E731
    found = put_together(answers, (world, "few-values", "stored"), starts)
    assert_same(*found, ff.top_k_mask(MODELS["few-values"], k=250))


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_rank_sends_does_not_depend_on_n(answers, world):
    for rank in range(world):
        traffic = answers[rank][1]
        for (of, model, rule, *_), sent in traffic.items():
            num_tensors = {"tiny": 3000, "big": 3}.get(model, len(SHAPES))
            if of == world and rule != "layers":
                assert sent <= 48 * 1000 + 8 * (num_tensors + world), (model, rule)
        # One more number where ties run out within a tensor.
        small = traffic[world, "random", "half"] - 8 * len(SHAPES)
        assert abs(traffic[world, "big", "traffic"] - 8 * 3 - small) <= 8


@pytest.mark.parametrize("kind", REFUSED)
def test_an_error_in_one_process_raises_in_all(answers, kind):
    own = answers[1][2][kind]
    name, _, text = own.partition(": ")
    assert REFUSED[kind] in text
    assert name == {"dtype": "TypeError", "no mapping": "TypeError", "Ctrl-C": "KeyboardInterrupt"
                    }.get(kind, "ValueError")  # fmt: skip
    for rank in (0, 2):
        assert answers[rank][2][kind] == f"ValueError: rank 1 of process_group failed; {own}"


@pytest.mark.parametrize("kind", SAME_IN_ALL)
def test_what_all_can_see_is_the_same_error_in_all(answers, kind):
    texts = {answers[rank][2][kind] for rank in range(3)}
    assert len(texts) == 1
    assert SAME_IN_ALL[kind] in texts.pop()


def test_dtensors_that_are_refused(answers):
    for rank in range(3):
        errors = answers[rank][2]
        rule = "DTensor scores must be placed as Shard(0) or Replicate(); 'z' is "
        assert rule + "S" in errors["columns"]
        assert rule + "P" in errors["partial"]
        assert (
            "process_group must be mesh.get_group() for DTensor scores; 'z'" in errors["no group"]
        )
        assert errors["not a group"].startswith("TypeError: process_group must be a torch.distr")
        if rank < 2:
            assert "on a mesh of one dimension over process_group; 'z' is on" in errors["elsewhere"]


def test_the_group_works_on_after_errors(answers):
    for rank in range(3):
        found = answers[rank][0]
        before, after = found[3, "random", "some"][0], found[3, "random", "after errors"][0]
        assert all(torch.equal(before[name], after[name]) for name in SHAPES)


def test_copies_that_differ_are_refused_by_every_process(answers):
    for rank in range(3):
        assert "replicated scores must be the same in every process" in answers[rank][2]["copies"]
        assert "'head'" in answers[rank][2]["copies"]


def test_what_fails_while_indices_are_written_fails_in_every_process(answers):
    assert "the file ends here" in answers[1][2]["emission"]
    for rank in (0, 2):
        assert (
            "rank 1 of process_group failed; ValueError: the file ends here"
            in (answers[rank][2]["emission"])
        )


def test_a_number_of_numpy_is_the_same_rule(answers):
    whole, num_zero = put_together(
        answers, (3, "random", "numpy"), lambda name: [start for start, _ in bounds(name, 3)]
    )
    assert_same(whole, num_zero, ff.top_k_mask(MODELS["random"], k=77))


@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
def test_messages_go_by_the_cpu_where_the_group_can(backend):
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        scores = MODELS["random"]
        mask = ff.top_k_mask(scores, k=77, process_group=dist.group.WORLD)
        assert mask == ff.top_k_mask(scores, k=77)
    finally:
        dist.destroy_process_group()
