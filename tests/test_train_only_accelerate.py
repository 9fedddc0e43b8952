"""Accelerate on a tuned model: its own loop, state files and wrapped optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import assert_state, same_bits, state_of
from torch import nn
from train_only_modules import mask_over_all, numbers
from train_only_net import assert_masters_match

import fishfast as ff

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _own_state() -> Any:
    """Accelerate keeps its precision in a state of the process; its own tests reset it so."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


class Run:
    """A training loop as Accelerate's documentation writes it."""

    def __init__(self, dtype: torch.dtype = torch.float32, mixed_precision: str = "no") -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision
        )
        plain = net().to(dtype)
        self.dtype = dtype
        self.tuned = ff.train_only(plain, mask_over_all(plain))
        optimizer = ff.AdamW(self.tuned.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            plain, optimizer, scheduler
        )

    def train(self, steps: int, first: int = 0) -> list[float]:
        losses = []
        for seed in range(first, first + 2 * steps):
            with self.accelerator.accumulate(self.model):
                loss = (self.model(numbers(16, 6, seed=seed % 4).to(self.dtype)) - 1.0).square()
                losses.append(loss.mean().item())
                self.accelerator.backward(loss.mean())
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return losses


def assert_same_run(a: Run, b: Run) -> None:
    assert_state(a.tuned.model, state_of(b.tuned.model))
    for mine, other in zip(a.tuned.parameters(), b.tuned.parameters(), strict=True):
        assert same_bits(mine, other)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert same_bits(a.optimizer.state[mine][key], b.optimizer.state[other][key])


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_loss_falls_and_the_rest_stays(mixed_precision: str) -> None:
    run = Run(mixed_precision=mixed_precision)
    before, mask = state_of(run.tuned.model), run.tuned.mask
    losses = run.train(20)
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    for name, tensor in run.tuned.model.state_dict().items():
        rest = torch.ones(tensor.numel(), dtype=torch.bool)
        rest[mask[name].long()] = False
        assert same_bits(tensor.flatten()[rest], before[name].flatten()[rest]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_from_saved_state_equals_not_having_stopped(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    through = Run(dtype)
    through.train(3)
    through.accelerator.save_state(str(tmp_path))
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "model.safetensors")) == set(net().state_dict())
    through.train(3, first=6)

    again = Run(dtype)
    again.accelerator.load_state(str(tmp_path))
    again.train(3, first=6)
    assert_same_run(again, through)
    assert_masters_match(again.tuned.model)


def test_remask_takes_the_wrapped_optimizer() -> None:
    wrapped, bare = Run(), Run()
    for run, optimizer in ((wrapped, wrapped.optimizer), (bare, bare.optimizer.optimizer)):
        run.train(2)
        assert (optimizer is run.optimizer) == (run is wrapped)
        run.tuned.remask(ff.random_mask(net(), k=40, seed=3), "restore", optimizer=optimizer)
        run.train(2, first=4)
    assert_same_run(wrapped, bare)
    stale: Any = Run()
    stale.train(1)
    stale.tuned.remask(copy.deepcopy(stale.tuned.mask))
    with pytest.raises(RuntimeError, match=r"from before tuned\.remask"):
        stale.train(1)
