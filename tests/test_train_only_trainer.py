"""The Trainer of transformers on a tuned model: three lines, no fork, nothing switched off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import TORCH_HAS_FMA, CorrectSqrt, same_bits, state_of
from torch import Tensor, nn
from train_only_modules import mask_over_all
from train_only_net import assert_masters_match
from train_only_transformers import tiny_transformer

import fishfast as ff

tf = pytest.importorskip("transformers")

LR = 1e-2


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def examples(causal: bool = False, count: int = 16) -> list[dict[str, Any]]:
    """Sequences whose label is whether they start with a small token."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 50, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row if causal else int(row[0] < 26)} for row in rows]


def tuned_of(name: str, dtype: torch.dtype = torch.float32) -> ff.SparseTuning:
    model, _ = tiny_transformer(name)
    return ff.train_only(model.to(dtype), mask_over_all(model))


def trainer_of(
    model: nn.Module, data: list[dict[str, Any]], optimizer: Any = None, **options: Any
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": "out", "use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 4,
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    arguments = tf.TrainingArguments(**{**settings, **options})
    return tf.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data,
        optimizer_cls_and_kwargs=optimizer or (ff.AdamW, {"lr": LR}),
    )  # fmt: skip


def outside(tuned: ff.SparseTuning, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with all masked entries, under every name of theirs, set to zero."""
    masks = {id(p): tuned.mask[name] for name, p in tuned.model.named_parameters()
             if name in tuned.mask}  # fmt: skip
    kept = {}
    for name, parameter in tuned.model.state_dict(keep_vars=True).items():
        kept[name] = state[name].clone()
        if id(parameter) in masks:
            kept[name].view(-1)[masks[id(parameter)].long()] = 0
    return kept


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), name


def everything(tuned: ff.SparseTuning, trainer: Any) -> dict[str, Tensor]:
    """Return the weights, the masters and the moments."""
    found = state_of(tuned.model)
    for name, parameter in tuned.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.clone()
    assert sum(name.endswith(".exp_avg_sq") for name in found) == len(list(tuned.parameters()))
    return found


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16 autocast"])
def test_loss_falls_and_the_rest_stays(amp: bool) -> None:
    tuned = tuned_of("bert")
    before = state_of(tuned.model)
    trainer = trainer_of(
        tuned.model, examples(), max_steps=40, bf16=amp, gradient_accumulation_steps=2,
        lr_scheduler_type="cosine", warmup_steps=4,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert trainer.evaluate()["eval_loss"] < 0.5 * losses[0]
    assert_same(outside(tuned, state_of(tuned.model)), outside(tuned, before))
    assert_masters_match(tuned.model)


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch rounds twice where we round once")
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16 autocast"])
def test_equals_dense_training_with_masked_gradients_bit_for_bit(amp: bool) -> None:
    """Scheduler, accumulation and autocast included; without clipping, whose sum has an order."""
    model, _ = tiny_transformer("bert")
    dense, mask = copy.deepcopy(model), mask_over_all(model)
    for name, parameter in dense.named_parameters():
        kept = torch.zeros(parameter.numel())
        kept[mask[name].long()] = 1.0
        parameter.register_hook(kept.view(parameter.shape).mul)
    options = {
        "gradient_accumulation_steps": 2, "warmup_steps": 2, "max_grad_norm": 0.0, "bf16": amp,
        "weight_decay": 0.0,
    }  # fmt: skip
    ff.train_only(model, mask)
    trainer_of(model, examples(), **options).train()
    reference = (torch.optim.AdamW, {"lr": LR, "foreach": False})
    with CorrectSqrt():
        trainer_of(dense, examples(), reference, **options).train()
    assert_same(state_of(model), state_of(dense))


def test_clipping_and_accumulation_reach_the_compact_gradients() -> None:
    """One SGD step moves the masters by lr times the clipped gradient of the joined batch."""
    tuned = tuned_of("bert")
    for module in tuned.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = {key: torch.stack([torch.as_tensor(row[key]) for row in examples()])
             for key in ("input_ids", "labels")}  # fmt: skip
    tuned.model(**whole).loss.backward()
    gradients = torch.cat([parameter.grad.clone() for parameter in tuned.parameters()])
    tuned.model.zero_grad()
    start = torch.cat([parameter.detach().clone() for parameter in tuned.parameters()])
    trainer = trainer_of(
        tuned.model, examples(), (ff.SGD, {"lr": 8.0}), max_steps=1, max_grad_norm=0.01,
        gradient_accumulation_steps=4, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    moved = torch.cat([parameter.detach() for parameter in tuned.parameters()]) - start
    assert gradients.norm() > 0.1
    expected = -8.0 * gradients * (0.01 / gradients.norm())
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bert", torch.float32), ("bert", torch.bfloat16), ("gpt2", torch.float32)],
    ids=["bert fp32", "bert bf16 weights", "gpt2 with its tied head"],
)
def test_resume_equals_not_having_stopped(name: str, dtype: torch.dtype) -> None:
    data = examples(causal=name == "gpt2")
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    through = tuned_of(name, dtype)
    trainer = trainer_of(through.model, data, **options)
    trainer.train()
    expected = everything(through, trainer)

    again = tuned_of(name, dtype)  # in a new process: the base, the mask, the same three lines
    resumed = trainer_of(again.model, data, **options)
    resumed.train(resume_from_checkpoint="out/checkpoint-3")
    assert resumed.state.global_step == 6
    assert_same(everything(again, resumed), expected)
    assert_masters_match(again.model)
    ff.save_delta(again, "task.safetensors")
    base, _ = tiny_transformer(name)
    ff.load_delta("task.safetensors").apply_(base.to(dtype))
    assert_same(state_of(base), state_of(again.model))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_checkpoints_are_those_of_the_plain_model(name: str) -> None:
    tuned = tuned_of(name)
    trainer = trainer_of(tuned.model, examples(name == "gpt2"), save_strategy="steps", save_steps=6)
    trainer.train()
    plain, _ = tiny_transformer(name)
    plain.save_pretrained("plain")
    trainer.save_model("saved")
    from safetensors.torch import load_file

    keys = set(load_file("plain/model.safetensors"))
    for folder in ("out/checkpoint-6", "saved"):
        assert set(load_file(f"{folder}/model.safetensors")) == keys
        loaded = type(plain).from_pretrained(folder)
        assert_same(state_of(loaded), state_of(tuned.model))


def test_best_model_is_loaded_and_trains_on() -> None:
    tuned = tuned_of("bert")
    before = state_of(tuned.model)
    trainer = trainer_of(
        tuned.model, examples(), (ff.AdamW, {"lr": 0.5}), max_steps=4, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-4")  # this learning rate makes it worse, so there is one to load
    loaded = type(tuned.model).from_pretrained(best)
    assert_same(state_of(tuned.model), state_of(loaded))
    assert_masters_match(tuned.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    ff.save_delta(tuned, "task.safetensors")
    for parameter in tuned.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ff.SGD(tuned.parameters(), lr=0.1).step()  # the masters of the last step are gone
    assert_same(state_of(tuned.model), state_of(loaded))
    assert_same(outside(tuned, state_of(tuned.model)), outside(tuned, before))


def test_remask_in_a_callback() -> None:
    """The Trainer makes two param groups; tensors new to the mask must be sent to one of them."""
    plain, _ = tiny_transformer("bert")
    first, second = (ff.random_mask(plain, density=0.3, seed=seed) for seed in (1, 2))
    tuned = ff.train_only(plain, first)
    before = state_of(tuned.model)

    class Remask(tf.TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 20:
                tuned.remask(second, optimizer=given["optimizer"], param_group=lambda name: 0)

    trainer = trainer_of(tuned.model, examples(), max_steps=50, lr_scheduler_type="constant")
    trainer.add_callback(Remask())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[16:21])
    assert tuned.mask == second
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in tuned.parameters()}
    for name, parameter in tuned.model.named_parameters():
        if name in second:
            changed = (parameter.detach() != before[name]).flatten().nonzero().flatten().tolist()
            assert set(changed) <= {*first[name].tolist(), *second[name].tolist()}, name
    ff.save_delta(tuned, "task.safetensors")
    base, _ = tiny_transformer("bert")
    ff.load_delta("task.safetensors").apply_(base)
    assert_same(state_of(base), state_of(tuned.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_default_optimizer_trains_the_model_and_its_delta_has_it(dtype: torch.dtype) -> None:
    """The Trainer's own, torch's fused AdamW, which counts no versions; attach is not called."""
    tuned = tuned_of("bert", dtype)
    base = copy.deepcopy(tuned).release()
    before = state_of(tuned.model)
    arguments = tf.TrainingArguments(
        output_dir="out", use_cpu=True, max_steps=6, learning_rate=LR, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = tf.Trainer(model=tuned.model, args=arguments, train_dataset=examples())
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.optimizer.defaults["fused"]
    assert_masters_match(tuned.model)
    after = state_of(tuned.model)
    assert_same(outside(tuned, after), outside(tuned, before))
    masked = [name for name, found in tuned.mask.items() if len(found)]
    still = [name for name in masked if same_bits(after[name], before[name])]
    assert len(still) < 0.1 * len(masked)  # some rows of an embedding are in no batch
    ff.save_delta(tuned, "delta")
    ff.load_delta("delta").apply_(base)
    assert_same(state_of(base), after)
