"""What the tests on a card run: a small net with its batches, and parameters on both devices."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fishfast as ff


def net() -> nn.Module:
    """Return a net of convolution, norms and linear layers for images of 8 x 8, on the CPU."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 5),
    )


def batches(device: str, count: int = 3, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 16 images with their labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(16, 1, 8, 8, generator=generator).to(device),
            torch.randint(0, 5, (16,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def images(seed: int) -> Tensor:
    """Return the images of one batch, on the card."""
    return batches("cuda", 1, seed)[0][0]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return one loss per image."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def tuned_on_both(
    dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[dict[str, nn.Module], dict[str, ff.SparseTuning]]:
    """Return the same parameters on CPU and card, under the same mask, and their handles."""
    shapes = [(1031,), (64, 33, 3, 3), (2049, 7), (1,)]
    model = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes]).to(dtype)
    if layout == "channels_last":
        model[1].data = model[1].data.to(memory_format=torch.channels_last)
    mask = ff.random_mask(model, density=0.4, seed=0)
    models = {"cpu": model, "cuda": copy.deepcopy(model).cuda()}
    return models, {device: ff.train_only(m, mask) for device, m in models.items()}


def going_on_from_torch(
    make: Any, torch_make: Any, torch_options: dict[str, Any], **options: Any
) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    """Load torch's state after three steps, and let both take three more on the same gradients.

    Returns:
        Our compact parameter, torch's parameter of the same values, and our optimizer.
    """
    model = nn.ParameterList([torch.randn(300, 7)]).cuda()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    (values,) = tuned.parameters()
    reference = nn.Parameter(values.detach().clone())
    theirs = torch_make([reference], lr=1e-2, weight_decay=0.1, **torch_options)
    ours = make([values], **options)
    for step in range(6):
        reference.grad = torch.randn_like(reference)
        if step == 3:
            ours.load_state_dict(theirs.state_dict())
            with torch.no_grad():
                values.copy_(reference)
        if step >= 3:
            values.grad = reference.grad.clone()
            ours.step()
        theirs.step()
    return values, reference, ours


def assert_same_weights(models: dict[str, nn.Module]) -> None:
    """Compare what `tuned_on_both` made, bit for bit."""
    for on_cpu, on_gpu in zip(*(m.parameters() for m in models.values()), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())


def assert_same_states(optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Compare the states of the optimizer on the CPU with those on the card, bit for bit."""
    for on_cpu, on_gpu in zip(*(o.state.values() for o in optimizers.values()), strict=True):
        assert all(torch.equal(value, on_gpu[name].cpu()) for name, value in on_cpu.items())
