"""Compiled and parallel wrappers, spawned processes, odd bases, weights held elsewhere."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stepping import assert_state, mask_of, same_bits, state_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import return_and_correct_aliasing

import fishfast as ff


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def compiled() -> Any:
    return torch.compile(net(), backend="eager")


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def assert_same(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    assert all(same_bits(a[name], b[name]) for name in a)


BATCHES = [(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4))]


def test_masks_and_deltas_of_a_compiled_model_have_the_names_of_the_model(tmp_path: Path) -> None:
    model = compiled()
    scores = ff.estimate_fisher(model, BATCHES, loss_fn=loss_fn)
    assert_same(scores, ff.estimate_fisher(net(), BATCHES, loss_fn=loss_fn))
    mask = ff.top_k_mask(scores, density=0.1)
    tuned = ff.train_only(model, mask)
    assert tuned.model is model._orig_mod
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(model, BATCHES[0]).mean().backward()
        optimizer.step()
    ff.save_delta(tuned, tmp_path / "delta")
    base, wrapped = net(), compiled()
    for other in (base, wrapped):
        assert ff.load_delta(tmp_path / "delta").apply_(other) is other
    assert_state(base, state_of(tuned.model))
    assert_state(wrapped._orig_mod, state_of(tuned.model))
    assert ff.random_mask(compiled(), k=5, seed=0) == ff.random_mask(net(), k=5, seed=0)
    assert set(ff.magnitude_scores(compiled())) == set(ff.magnitude_scores(net()))
    ff.train_only(net(), mask)


def test_a_compiled_model_through_get_fish_model(tmp_path: Path) -> None:
    config = ff.FishConfig(density=0.1)
    model = ff.get_fish_model(compiled(), config, BATCHES, loss_fn)
    plain = ff.get_fish_model(net(), config, BATCHES, loss_fn)
    assert model.fish.mask == plain.fish.mask
    model.fish.save_pretrained(tmp_path)
    assert ff.from_pretrained(net(), tmp_path).fish.mask == plain.fish.mask


def test_a_model_in_ddp_is_scored_and_not_tuned(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net())
        scores = ff.estimate_fisher(wrapped, BATCHES, loss_fn=loss_fn)
        assert_same(scores, ff.estimate_fisher(net(), BATCHES, loss_fn=loss_fn))
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel after train_only"):
            ff.train_only(wrapped, ff.top_k_mask(scores, density=0.1))
        tuned = ff.train_only(wrapped.module, ff.top_k_mask(scores, density=0.1))
        del tuned
    finally:
        dist.destroy_process_group()


def _child(rank: int, given: Any, folder: str) -> None:
    mask = given if isinstance(given, ff.SparseMask) else given.mask
    Path(folder, "fingerprint").write_text(mask.fingerprint)
    if isinstance(given, ff.SparseTuning):
        optimizer = torch.optim.SGD(given.parameters(), lr=0.5)
        given.model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        torch.save(given.model.state_dict(), Path(folder, "state"))
    os._exit(0)


@pytest.mark.parametrize("kind", ["mask", "handle"])
def test_a_spawned_process_gets_masks_and_tuned_models(kind: str, tmp_path: Path) -> None:
    model = net()
    mask = ff.random_mask(model, density=0.3, seed=0)
    tuned = ff.train_only(model, mask)
    alone = copy.deepcopy(tuned)  # what is sent is in shared memory
    torch.multiprocessing.spawn(_child, ({"mask": mask, "handle": tuned}[kind], str(tmp_path)))
    assert (tmp_path / "fingerprint").read_text() == mask.fingerprint
    if kind == "handle":
        alone.model(torch.ones(1, 8)).sum().backward()
        torch.optim.SGD(alone.parameters(), lr=0.5).step()
        assert_same(torch.load(tmp_path / "state"), state_of(alone.model))


def test_masks_and_deltas_are_pickled_and_copied(tmp_path: Path) -> None:
    model = net()
    mask = ff.random_mask(model, density=0.3, seed=0)
    tuned = ff.train_only(model, mask)
    ff.save_delta(tuned, tmp_path / "delta")
    delta = ff.load_delta(tmp_path / "delta")
    delta.apply_(base := net())
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert copied(mask) == mask
        assert all(
            same_bits(a, b) for a, b in zip(copied(mask).values(), mask.values(), strict=True)
        )
        other = copied(delta)
        other.apply_(net())
        with pytest.raises(RuntimeError, match="apply_ was not called on it"):
            other.revert_(base)  # which is the first one's
    delta.revert_(base)


class Doubled(Tensor):
    """A tensor class around another tensor, as torchao's quantized weights are."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half: Tensor) -> None:
        self.half = half

    def __tensor_flatten__(self) -> Any:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Doubled:
        return Doubled(inner["half"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [2 * a.half if isinstance(a, Doubled) else a for a in args]
        out = func(*plain, **(kwargs or {}))
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            out = Doubled(args[0].half)
            return return_and_correct_aliasing(func, args, kwargs or {}, out)
        return out


class OddBase(nn.Module):
    """Buffers and weights without memory of their own; the mask is on a norm."""

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.register_buffer("coo", (number * torch.eye(4)).to_sparse())
        self.register_buffer("csr", (number * torch.eye(4)).to_sparse_csr())
        self.register_buffer("csc", (number * torch.eye(4)).to_sparse_csc())
        self.register_buffer("bsr", (number * torch.eye(4)).to_sparse_bsr((2, 2)))
        self.register_buffer(
            "per_tensor", torch.quantize_per_tensor(torch.eye(4), number, 0, torch.qint8)
        )
        scales = torch.full((4,), number)
        self.register_buffer(
            "per_channel",
            torch.quantize_per_channel(torch.eye(4), scales, torch.zeros(4), 0, torch.qint8),
        )
        self.doubled = nn.Parameter(Doubled(torch.full((4, 4), number)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_sparse_or_quantized_base_is_tuned_where_the_mask_is(tmp_path: Path) -> None:
    model = OddBase()
    mask = ff.SparseMask({"norm.weight": torch.tensor([0, 2])}, {"norm.weight": (4,)})
    tuned = ff.train_only(model, mask)
    again = ff.train_only(OddBase(), mask)
    assert tuned.base == again.base
    other = ff.train_only(OddBase(2.0), mask)
    first, second = ({**t.base.weights, **t.base.buffers} for t in (tuned, other))
    same = {name for name in first if first[name] == second[name]}
    assert same == {"norm.weight", "norm.bias"}
    model(torch.randn(2, 4)).square().sum().backward()
    ff.AdamW(tuned.parameters()).step()
    assert tuned.identify().weights == tuned.base.weights


def test_a_weight_that_is_tied_outside_of_the_model_is_refused() -> None:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    mask = mask_of(embedding, {"weight": torch.tensor([1, 5])})
    before = state_of(embedding)
    with pytest.raises(ValueError, match=r"'weight' is also in a Linear outside of it"):
        ff.train_only(embedding, mask)
    assert_state(embedding, before)
    assert embedding.weight.requires_grad
    held = list(embedding.parameters())  # by others than modules it may be held
    head.weight = nn.Parameter(head.weight.detach().clone())
    ff.train_only(embedding, mask)
    assert len(held) == 1
