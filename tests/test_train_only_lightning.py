"""PyTorch Lightning on a tuned model: its Trainer as it is, with nothing switched off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import same_bits, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from train_only_modules import mask_over_all, numbers
from train_only_net import assert_masters_match, compact

import fishfast as ff

os.environ.setdefault("HF_HUB_OFFLINE", "1")
L = pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|litlogger|isinstance)"),
    pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|dirpath has changed)"),
]
EPOCHS, BATCHES = 4, 4


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def data() -> DataLoader:
    """In a fixed order: Lightning does not save the state of a sampler."""
    return DataLoader(TensorDataset(numbers(4 * BATCHES, 6), numbers(4 * BATCHES, 3)), batch_size=4)


class Module(L.LightningModule):
    """What a user writes; the learning rate changes by a factor after each epoch."""

    def __init__(
        self, optimizer: Any = ff.AdamW, lr: float = 0.05, factor: float = 0.9, dtype: Any = None
    ) -> None:
        super().__init__()
        plain = net().to(dtype)
        self.net, self.optimizer, self.lr, self.factor = plain, optimizer, lr, factor
        self.tuned = ff.train_only(plain, mask_over_all(plain))
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.tuned.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.net(x.to(self.dtype)) - y).float().square().mean()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch))


def fit(module: Module, folder: Path, ckpt_path: Any = None, **options: Any) -> Any:
    keep = L.pytorch.callbacks.ModelCheckpoint(
        folder, "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True
    )
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS, "accelerator": "cpu", "logger": False, "callbacks": [keep],
        "enable_progress_bar": False, "enable_model_summary": False, **options,
    }  # fmt: skip
    trainer = L.Trainer(**settings)
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return trainer


def assert_rest_untouched(module: Module, dtype: Any = None) -> None:
    before = state_of(net().to(dtype))
    moved = 0
    for name, tensor in module.net.state_dict().items():
        rest = torch.ones(tensor.numel(), dtype=torch.bool)
        rest[module.tuned.mask[name].long()] = False
        assert same_bits(tensor.flatten()[rest], before[name].flatten()[rest]), name
        moved += int((tensor != before[name]).sum())
    assert moved > 0.9 * module.tuned.num_selected


def assert_same_run(a: Module, b: Module) -> None:
    for name, tensor in state_of(a.net).items():
        assert same_bits(tensor, state_of(b.net)[name]), name
    for mine, other in zip(a.tuned.parameters(), b.tuned.parameters(), strict=True):
        assert same_bits(mine, other)
        ours, theirs = (m.optimizers().state[p] for m, p in ((a, mine), (b, other)))
        assert ours.keys() == theirs.keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(same_bits(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_loss_falls_and_the_rest_stays(precision: str, tmp_path: Path) -> None:
    """Lightning converts the module; one converted before train_only is as it should be."""
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision)
    module = Module(dtype=dtype)
    fit(module, tmp_path, precision=precision, max_epochs=12)
    assert sum(module.losses[-BATCHES:]) < 0.6 * sum(module.losses[:BATCHES])
    assert_rest_untouched(module, dtype)
    assert_masters_match(module.net)
    assert all(p.dtype == torch.float32 for p in compact(module.net))
    ff.save_delta(module.tuned, tmp_path / "task.safetensors")
    base = net().to(dtype)
    ff.load_delta(tmp_path / "task.safetensors").apply_(base)
    for name, tensor in state_of(base).items():
        assert same_bits(tensor, module.net.state_dict()[name]), name


def test_converted_by_lightning_after_train_only_the_delta_is_refused(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, precision="bf16-true", max_epochs=1)
    assert module.net[0].weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in compact(module.net))
    with pytest.raises(RuntimeError, match="convert the model before train_only"):
        ff.save_delta(module.tuned, tmp_path / "task.safetensors")


def test_16_mixed_on_a_cpu_is_lightnings_bf16(tmp_path: Path) -> None:
    """fp16 with loss scaling is for a GPU: Lightning says so, and the run is the bf16 one."""
    half, brain = Module(), Module()
    with pytest.warns(UserWarning, match="bf16-mixed"):
        fit(half, tmp_path / "a", precision="16-mixed")
    fit(brain, tmp_path / "b", precision="bf16-mixed")
    assert_same_run(half, brain)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_and_accumulation_reach_the_compact_gradients(
    algorithm: str, tmp_path: Path
) -> None:
    """One SGD step moves the masters by lr times the clipped gradient of the joined batch."""
    other = Module()
    (sum(other.loss(batch) for batch in data()) / BATCHES).backward()
    gradients = torch.cat([p.grad for p in other.tuned.parameters()])
    module, limit = Module(ff.SGD, lr=8.0), 0.01
    start = torch.cat([p.detach().clone() for p in module.tuned.parameters()])
    fit(
        module, tmp_path, max_epochs=1, accumulate_grad_batches=BATCHES, gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )  # fmt: skip
    moved = torch.cat([p.detach() for p in module.tuned.parameters()]) - start
    clipped = gradients.clamp(-limit, limit)
    if algorithm == "norm":
        clipped = gradients * (limit / gradients.norm())
    assert gradients.norm() > 10 * limit
    torch.testing.assert_close(moved, -8.0 * clipped, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 weights"])
def test_resume_equals_not_having_stopped(dtype: torch.dtype, tmp_path: Path) -> None:
    options = {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.5,
        "precision": "bf16-true" if dtype == torch.bfloat16 else "32-true",
    }  # fmt: skip
    through = Module(dtype=dtype)
    fit(through, tmp_path / "through", **options)

    again = Module(dtype=dtype)  # in a new process: the base, the mask, the same module
    trainer = fit(again, tmp_path / "again", tmp_path / "through" / "epoch=1.ckpt", **options)
    assert trainer.current_epoch == EPOCHS
    assert again.losses == through.losses[2 * BATCHES :]
    assert_same_run(again, through)
    assert_masters_match(again.net)
    assert_rest_untouched(again, dtype)


def test_checkpoints_have_the_plain_models_keys(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"net.{name}" for name in net().state_dict()}
    plain = net()
    plain.load_state_dict({name.removeprefix("net."): v for name, v in saved.items()})
    for name, tensor in state_of(plain).items():
        assert same_bits(tensor, module.net.state_dict()[name])


def test_best_model_is_loaded_and_trains_on(tmp_path: Path) -> None:
    module = Module(lr=0.02, factor=20.0)  # it gets worse, so there is a best one to load
    trainer = fit(module, tmp_path)
    best = trainer.checkpoint_callback
    assert not best.best_model_path.endswith(f"epoch={EPOCHS - 1}.ckpt")
    (found,) = trainer.validate(module, data(), ckpt_path="best", verbose=False)
    assert found["val_loss"] == pytest.approx(best.best_model_score.item(), abs=1e-6)
    loaded = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    for name, tensor in module.net.state_dict().items():
        assert same_bits(tensor, loaded[f"net.{name}"]), name
    assert_masters_match(module.net)  # those of the last step are gone
    assert_rest_untouched(module)
    ff.save_delta(module.tuned, tmp_path / "task.safetensors")
    losses = len(module.losses)
    module.lr, module.factor = 0.01, 1.0
    fit(module, tmp_path / "on", max_epochs=2)
    assert module.losses[-1] < module.losses[losses]
    assert_rest_untouched(module)
