"""What only a card can show: every stage gives on CUDA what it gives on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_models import (
    assert_same_states,
    assert_same_weights,
    batches,
    going_on_from_torch,
    losses,
    net,
    tuned_on_both,
)
from torch import nn

import fishfast as ff

pytestmark = pytest.mark.gpu

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_extension_sees_the_card() -> None:
    """The CUDA kernels, not a fallback, are what "auto" takes here."""
    for operation in ("sparse_adam", "sparse_sgd"):
        assert ff.build_info()["operations"][operation]["cuda"] == "cuda"


def test_fisher_equals_the_cpu() -> None:
    model = net()
    on_cpu = ff.estimate_fisher(model, batches("cpu"), loss_fn=losses)
    on_gpu = ff.estimate_fisher(model.cuda(), batches("cuda"), loss_fn=losses)
    assert not on_gpu.fallback
    for name, score in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name].cpu(), score, rtol=1e-3, atol=1e-3 * float(score.max())
        )


def test_fisher_is_deterministic() -> None:
    model = net().cuda()
    first, second = (ff.estimate_fisher(model, batches("cuda"), loss_fn=losses) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_mask_equals_the_cpu(dtype: torch.dtype) -> None:
    scores = {
        "a": torch.randn(300, 257).abs().to(dtype),
        "ties": torch.randint(0, 3, (4099,)).to(dtype),
        "zero": torch.zeros(77, dtype=dtype),
    }
    on_gpu = ff.top_k_mask({name: s.cuda() for name, s in scores.items()}, density=0.3)
    assert on_gpu == ff.top_k_mask(scores, density=0.3)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ff.AdamW, {"weight_decay": 0.1}),
        (ff.AdamW, {"amsgrad": True, "betas": (0.9, 0.5)}),
        (ff.Adam, {"weight_decay": 0.1, "maximize": True}),
        (ff.SGD, {}),
        (ff.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        (ff.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ],
    ids=["AdamW", "amsgrad", "Adam", "SGD", "dampening", "nesterov"],
)
def test_step_equals_the_cpu_bit_for_bit(
    make: Any, options: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    """Same gradients, ten steps: weights, masters and state have the same bits."""
    models, tuned = tuned_on_both(dtype, layout)
    optimizers = {
        device: make(t.parameters(), lr=1e-2, backend=device, **options)
        for device, t in tuned.items()
    }
    for _ in range(10):
        for on_cpu, on_gpu in zip(*(t.parameters() for t in tuned.values()), strict=True):
            on_cpu.grad = torch.randn_like(on_cpu)
            on_gpu.grad = on_cpu.grad.cuda()
        for optimizer in optimizers.values():
            optimizer.step()
    assert_same_weights(models)
    assert_same_states(optimizers)


@pytest.mark.parametrize(
    ("make", "torch_make", "options"),
    [
        (ff.AdamW, torch.optim.AdamW, {"capturable": True, "amsgrad": True}),
        (ff.AdamW, torch.optim.AdamW, {"fused": True}),
        (ff.Adam, torch.optim.Adam, {"foreach": True}),
        (ff.SGD, torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    ],
    ids=["capturable", "fused", "foreach", "SGD fused"],
)
def test_state_of_torch_on_the_card_loads(make: Any, torch_make: Any, options: Any) -> None:
    """Where torch kept its step count does not matter; both go on alike, to rounding."""
    values, reference, ours = going_on_from_torch(make, torch_make, options)
    torch.testing.assert_close(values, reference)
    torch_make([reference]).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("make", [ff.AdamW, ff.SGD])
def test_step_in_a_graph_capture_is_refused(make: Any) -> None:
    model = nn.ParameterList([torch.ones(5)]).cuda()
    tuned = ff.train_only(model, ff.random_mask(model, k=3, seed=0))
    (values,) = tuned.parameters()
    values.grad = torch.ones(3, device="cuda")
    optimizer = make([values])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(graph):
        optimizer.step()
    optimizer.step()
    assert int((model[0] != 1).sum()) == 3


@pytest.mark.parametrize("make", [ff.AdamW, ff.SGD])
def test_step_past_two_billion_weights(make: Any) -> None:
    """Offsets past 2**31 need int64 indices; only the selected weights change."""
    numel = 2**31 + 4096
    model = nn.ParameterList([torch.zeros(numel, dtype=torch.bfloat16, device="cuda")])
    chosen = torch.tensor([0, 5, 2**31 - 1, 2**31, numel - 1])
    tuned = ff.train_only(model, ff.SparseMask({"0": chosen}, {"0": (numel,)}))
    (parameter,) = tuned.parameters()
    parameter.grad = torch.ones_like(parameter)
    make([parameter], lr=0.5, backend="cuda").step()
    changed = model[0].detach() != 0  # nonzero() of so many is not in every torch
    assert changed.sum() == len(chosen)
    assert changed[chosen.cuda()].all()


@pytest.mark.parametrize("make", [ff.AdamW, ff.Adam, ff.SGD])
def test_found_inf_skips_the_step(make: Any) -> None:
    model = net().cuda()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.1, seed=0))
    optimizer = make(tuned.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(losses(model, batches("cuda")[0]).mean()).backward()
    next(tuned.parameters()).grad[0] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(optimizer.state.values())


def test_train_save_and_load_across_devices(tmp_path: Path) -> None:
    """Trained on the card, its delta gives the same weights on a CPU copy of the base."""
    base = net()
    fisher = ff.estimate_fisher(base, batches("cpu"), loss_fn=losses)
    model = copy.deepcopy(base).cuda()
    tuned = ff.train_only(model, ff.top_k_mask(fisher, density=0.05, keep=["6"]))
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
    for batch in batches("cuda"):
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ff.save_delta(tuned, tmp_path / "delta.safetensors")
    ff.load_delta(tmp_path / "delta.safetensors").apply_(base)
    trained = tuned.release().cpu().state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in base.state_dict().items())


def test_moving_the_tuned_model_to_the_card() -> None:
    model = net()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.1, seed=0))
    model.cuda()
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
    losses(model, batches("cuda")[0]).mean().backward()
    before = model[4].weight.detach().clone()
    optimizer.step()
    changed = (model[4].weight.detach() != before).sum()
    assert 0 < int(changed) <= len(tuned.mask["4.weight"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_whole_road_on_a_second_card_while_the_first_is_current() -> None:
    """Scores, mask, steps and delta of a model on cuda:1 are those on the CPU; cuda:0 has none."""
    found = {}
    for device in ("cpu", "cuda:1"):
        torch.manual_seed(0)
        model = net().to(device)
        scores = ff.estimate_fisher(model, batches(device), loss_fn=losses)
        mask = ff.top_k_mask(scores, density=0.1)
        tuned = ff.train_only(model, mask)
        for optimizer in (ff.AdamW(tuned.parameters(), lr=0.1), ff.SGD(tuned.parameters(), lr=0.1)):
            for batch in batches(device):
                losses(model, batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        places = {t.device for t in (*model.state_dict().values(), *scores.values())}
        assert places == {torch.device(device)}
        found[device] = (scores, mask, dict(tuned.named_parameters()))
    assert torch.cuda.current_device() == 0
    (scores, mask, values), (other_scores, other_mask, other_values) = found.values()
    assert mask == other_mask
    for a, b in ((scores, other_scores), (values, other_values)):
        for name in a:
            torch.testing.assert_close(b[name].cpu(), a[name], rtol=1e-3, atol=1e-6)
