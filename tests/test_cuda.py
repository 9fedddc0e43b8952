"""What only a card can show: every stage gives on CUDA what it gives on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fishfast as ff

pytestmark = pytest.mark.gpu

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 5),
    )


def _batches(device: str, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 1, 8, 8, generator=generator).to(device),
            torch.randint(0, 5, (16,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_extension_sees_the_card() -> None:
    """The CUDA kernels, not a fallback, are what "auto" takes here."""
    for operation in ("sparse_adam", "sparse_sgd"):
        assert ff.build_info()["operations"][operation]["cuda"] == "cuda"


def test_fisher_equals_the_cpu() -> None:
    model = _model()
    on_cpu = ff.estimate_fisher(model, _batches("cpu"), loss_fn=_losses)
    on_gpu = ff.estimate_fisher(model.cuda(), _batches("cuda"), loss_fn=_losses)
    assert not on_gpu.fallback
    for name, score in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name].cpu(), score, rtol=1e-3, atol=1e-3 * float(score.max())
        )


def test_fisher_is_deterministic() -> None:
    model = _model().cuda()
    first, second = (ff.estimate_fisher(model, _batches("cuda"), loss_fn=_losses) for _ in range(2))
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
    shapes = [(1031,), (64, 33, 3, 3), (2049, 7), (1,)]
    model = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes]).to(dtype)
    if layout == "channels_last":
        model[1].data = model[1].data.to(memory_format=torch.channels_last)
    mask = ff.random_mask(model, density=0.4, seed=0)
    models = {"cpu": model, "cuda": copy.deepcopy(model).cuda()}
    tuned = {device: ff.train_only(m, mask) for device, m in models.items()}
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
    for on_cpu, on_gpu in zip(*(m.parameters() for m in models.values()), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())
    states = [list(optimizer.state.values()) for optimizer in optimizers.values()]
    for on_cpu, on_gpu in zip(*states, strict=True):
        assert all(torch.equal(on_cpu[name], on_gpu[name].cpu()) for name in on_cpu)


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
    model = nn.ParameterList([torch.randn(300, 7)]).cuda()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    (values,) = tuned.parameters()
    reference = nn.Parameter(values.detach().clone())
    theirs = torch_make([reference], lr=1e-2, weight_decay=0.1, **options)
    for step in range(6):
        reference.grad = torch.randn_like(reference)
        if step == 3:
            ours = make(tuned.parameters())
            ours.load_state_dict(theirs.state_dict())
            with torch.no_grad():
                values.copy_(reference)
        if step >= 3:
            values.grad = reference.grad.clone()
            ours.step()
        theirs.step()
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
    assert torch.equal(model[0].nonzero().flatten().cpu(), chosen)


@pytest.mark.parametrize("make", [ff.AdamW, ff.Adam, ff.SGD])
def test_found_inf_skips_the_step(make: Any) -> None:
    model = _model().cuda()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.1, seed=0))
    optimizer = make(tuned.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(_losses(model, _batches("cuda")[0]).mean()).backward()
    next(tuned.parameters()).grad[0] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not any(optimizer.state.values())


def test_train_save_and_load_across_devices(tmp_path: Path) -> None:
    """Trained on the card, its delta gives the same weights on a CPU copy of the base."""
    base = _model()
    fisher = ff.estimate_fisher(base, _batches("cpu"), loss_fn=_losses)
    model = copy.deepcopy(base).cuda()
    tuned = ff.train_only(model, ff.top_k_mask(fisher, density=0.05, keep=["6"]))
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
    for batch in _batches("cuda"):
        _losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ff.save_delta(tuned, tmp_path / "delta.safetensors")
    ff.load_delta(tmp_path / "delta.safetensors").apply_(base)
    trained = tuned.release().cpu().state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in base.state_dict().items())


def test_moving_the_tuned_model_to_the_card() -> None:
    model = _model()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.1, seed=0))
    model.cuda()
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-2)
    _losses(model, _batches("cuda")[0]).mean().backward()
    before = model[4].weight.detach().clone()
    optimizer.step()
    changed = (model[4].weight.detach() != before).sum()
    assert 0 < int(changed) <= len(tuned.mask["4.weight"])
