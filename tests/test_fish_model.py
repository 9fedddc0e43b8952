"""`FishConfig` and `get_fish_model`: one call for three, and a folder that brings it back."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import assert_state, same_bits, state_of
from torch import Tensor, nn

import fishfast as ff


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh())
        self.classifier = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def net() -> nn.Module:
    torch.manual_seed(4)
    return Net()


BATCHES = [
    (torch.randn(8, 6, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3)
    for i in range(3)
]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def outputs_fn(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = ff.AdamW(model.fish.parameters(), lr=0.01)
    for _ in range(steps):
        for batch in BATCHES:
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()


CONFIG = ff.FishConfig(k=50, keep="classifier", num_samples=20)


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (CONFIG, {"loss_fn": loss_fn}),
        (ff.FishConfig(density=0.4, exclude=["*.bias"], scope="layer"), {"loss_fn": loss_fn}),
        (ff.FishConfig(density=0.2, power=1), {"loss_fn": loss_fn}),
        (ff.FishConfig(k=30, fisher_type="exact", head="softmax"), {"outputs_fn": outputs_fn}),
        (
            ff.FishConfig(k=30, fisher_type="sampled", num_label_samples=2, seed=5),
            {"outputs_fn": outputs_fn},
        ),
    ],
    ids=["keep, k", "exclude, layer", "power 1", "exact", "sampled"],
)
def test_same_as_the_three_calls(config: ff.FishConfig, given: Any) -> None:
    """And every field arrives: the config says nothing that has no effect."""
    model = net()
    returned = ff.get_fish_model(model, config, BATCHES, **given)
    assert returned is model
    assert type(model) is Net
    fields = dataclasses.asdict(config)
    fisher = ff.estimate_fisher(
        net(), BATCHES, **given,
        **{name: fields[name] for name in ("num_samples", "fisher_type", "head", "power", "seed",
                                           "num_label_samples")},
    )  # fmt: skip
    chosen = {name: fields[name] for name in ("density", "k", "keep", "exclude", "scope")}
    assert model.fish.mask == ff.top_k_mask(fisher, **chosen)
    assert model.fish.config == config
    assert model.fish.model is model
    assert list(model.state_dict()) == list(net().state_dict())


def test_the_seed_and_the_draws_matter() -> None:
    def mask(**options: Any) -> ff.SparseMask:
        config = ff.FishConfig(k=30, fisher_type="sampled", **options)
        return ff.get_fish_model(net(), config, BATCHES, outputs_fn=outputs_fn).fish.mask

    assert mask(seed=1) == mask(seed=1) != mask(seed=2) != mask(seed=2, num_label_samples=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_put_on_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    model = ff.get_fish_model(net(), CONFIG, BATCHES, loss_fn)
    if dtype != torch.float32:
        model = net().to(dtype)
        half = [(x.to(dtype), y) for x, y in BATCHES]
        model = ff.get_fish_model(model, CONFIG, half, loss_fn)
        optimizer = ff.AdamW(model.fish.parameters(), lr=0.01)
        loss_fn(model, half[0]).mean().backward()
        optimizer.step()
    else:
        train(model)
    model.fish.save_pretrained(tmp_path / "new" / "task")
    assert sorted(os.listdir(tmp_path / "new" / "task")) == [
        "fish_config.json", "fish_delta.safetensors",
    ]  # fmt: skip

    base = net().to(dtype)
    with torch.no_grad():
        base.classifier.weight.uniform_()  # a new head is random in every process
    head = state_of(base)
    again = ff.from_pretrained(base, tmp_path / "new" / "task")
    assert again is base
    assert_state(again, state_of(model))
    assert again.fish.config == CONFIG
    assert again.fish.mask == model.fish.mask
    assert again.fish.base.structure == model.fish.base.structure
    assert [p.shape for p in again.fish.parameters()] == [p.shape for p in model.fish.parameters()]
    for parameter in again.fish.parameters():
        assert same_bits(parameter.detach().to(dtype), parameter.target.gather())
    # The base's values are known, so that remask can put them back.
    outside = ff.SparseMask({"body.0.bias": torch.tensor([0])}, model.fish.mask.shapes)
    again.fish.remask(outside, on_leave="restore")
    assert_same_but_for(again, head, {"body.0.bias"})


def assert_same_but_for(model: nn.Module, expected: dict[str, Tensor], names: set[str]) -> None:
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in model.state_dict().items():
        assert name in names | buffers or same_bits(tensor, expected[name]), name


def test_loaded_model_trains_on_and_saves_again(tmp_path: Path) -> None:
    """With the buffers that training changed, before and after."""
    model = ff.get_fish_model(net(), CONFIG, BATCHES, loss_fn)
    train(model)
    model.fish.save_pretrained(tmp_path / "a")
    again = ff.from_pretrained(net(), tmp_path / "a")
    again.fish.save_pretrained(tmp_path / "same")
    first, second = (
        ff.load_delta(tmp_path / folder / "fish_delta.safetensors") for folder in ("a", "same")
    )
    assert first.mask == second.mask
    assert (first.base_structure, first.base_content) == (
        second.base_structure,
        second.base_content,
    )
    for mine, other in ((first.values, second.values), (first.buffers, second.buffers)):
        assert mine.keys() == other.keys()
        assert all(same_bits(mine[name], other[name]) for name in mine)
    assert first.buffers
    train(again)
    train(model)
    assert_state(again, state_of(model))
    again.fish.save_pretrained(tmp_path / "a")  # over the old one
    assert_state(ff.from_pretrained(net(), tmp_path / "a"), state_of(model))


def test_release_and_copies() -> None:
    model = ff.get_fish_model(net(), CONFIG, BATCHES, loss_fn)
    copied = copy.deepcopy(model)
    assert copied.fish.model is copied
    before = state_of(model)
    train(copied)
    assert_state(model, before)
    with model.fish.released() as plain:
        assert not any(name.endswith("_values") for name, _ in plain.named_parameters())
    assert model.fish.get_nb_trainable_parameters() == (50, 6 * 9 + 9 + 9 + 9 + 9 * 3 + 3)
    assert model.fish.release() is model
    assert not hasattr(model, "fish")
    assert all(parameter.requires_grad for parameter in model.parameters())
    ff.get_fish_model(model, CONFIG, BATCHES, loss_fn)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (ff.FishConfig(keep="head"), "keep entry 'head' matches no parameter"),
        (ff.FishConfig(exclude="x.*"), "exclude entry 'x.*"),
        (ff.FishConfig(k=29, keep="classifier"), "29"),
        (ff.FishConfig(k=10**6), "k must be from 1 to the number of weights, 111; got 1000000"),
    ],
    ids=["keep", "exclude", "k below keep", "k above all"],
)
def test_mistakes_are_named_before_anything_is_scored(config: ff.FishConfig, match: str) -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("scored")

    model = net()
    with pytest.raises(ValueError, match=match):
        ff.get_fish_model(model, config, BATCHES, never)
    assert not hasattr(model, "fish")


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="config must be a FishConfig; got dict"):
        ff.get_fish_model(net(), {"k": 3}, BATCHES, loss_fn)
    model = net()
    model.fish = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must not have an attribute 'fish' of its own"):
        ff.get_fish_model(model, CONFIG, BATCHES, loss_fn)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got dict"):
        ff.get_fish_model({}, CONFIG, BATCHES, loss_fn)
    model = ff.get_fish_model(net(), CONFIG, BATCHES, loss_fn)
    handle = model.fish
    with pytest.raises(RuntimeError, match="model has a mask already"):
        ff.train_only(model, handle.mask)
    assert model.fish is handle


def test_another_base_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = ff.get_fish_model(net(), CONFIG, BATCHES, loss_fn)
    train(model)
    model.fish.save_pretrained(tmp_path)
    for other in (Net().requires_grad_(False), net().bfloat16(), nn.Linear(2, 2)):
        before, flags = state_of(other), [p.requires_grad for p in other.parameters()]
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(ValueError, match="another base model|must fit the model"):
            ff.from_pretrained(other, tmp_path)
        assert_state(other, before)
        assert not hasattr(other, "fish")
        assert [p.requires_grad for p in other.parameters()] == flags
        assert all(p.grad is not None and bool((p.grad == 1).all()) for p in other.parameters())
    os.remove(tmp_path / "fish_config.json")
    with pytest.raises(FileNotFoundError, match=r"fish_config\.json"):
        ff.from_pretrained(net(), tmp_path)


# --- the config alone ---


@pytest.mark.parametrize(
    "config",
    [
        ff.FishConfig(),
        ff.FishConfig(
            k=7, keep=["a", "*.bias"], exclude="b", scope="layer", num_samples=9,
            fisher_type="sampled", head="tokens", num_label_samples=4, power=1, seed=3,
        ),
        ff.FishConfig(density=0.29),
    ],
    ids=["default", "all", "density"],
)  # fmt: skip
def test_config_to_json_and_back(config: ff.FishConfig, tmp_path: Path) -> None:
    config.to_json_file(tmp_path / "c.json")
    assert ff.FishConfig.from_json_file(tmp_path / "c.json") == config
    assert os.listdir(tmp_path) == ["c.json"]
    contents = json.loads((tmp_path / "c.json").read_text())
    assert contents.pop("format") == "fishfast.config"
    assert contents.pop("format_version") == 1
    assert set(contents) == {field.name for field in dataclasses.fields(ff.FishConfig)}


def test_config_defaults_are_those_of_the_functions() -> None:
    import inspect

    config = ff.FishConfig()
    assert config.density == 0.005
    for function in (ff.estimate_fisher, ff.top_k_mask):
        for name, parameter in inspect.signature(function).parameters.items():
            if name != "density" and hasattr(config, name):
                assert getattr(config, name) == parameter.default, name


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"density": 0.1, "k": 3}, ValueError, "give density or k, not both; got density=0.1"),
        ({"density": 0}, ValueError, r"density must be in \(0, 1\]; got 0"),
        ({"density": float("nan")}, ValueError, r"density must be in \(0, 1\]; got nan"),
        ({"density": "1"}, TypeError, "density must be a number; got '1'"),
        ({"k": 0}, ValueError, "k must be at least 1; got 0"),
        ({"k": 1.5}, TypeError, "k must be a whole number; got 1.5"),
        ({"k": True}, TypeError, "k must be a whole number; got True"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1; got 0"),
        ({"seed": None}, TypeError, "seed must be a whole number; got None"),
        ({"num_label_samples": 0}, ValueError, "num_label_samples must be at least 1; got 0"),
        ({"keep": 3}, TypeError, "keep must be a path, a glob or several of them; got 3"),
        ({"exclude": ["a", 3]}, TypeError, "exclude must be a path, a glob or several"),
        ({"fisher_type": "true"}, ValueError, "fisher_type must be one of .*; got 'true'"),
        ({"head": "x"}, ValueError, "head must be one of .*; got 'x'"),
        ({"scope": "model"}, ValueError, "scope must be one of .*; got 'model'"),
        ({"power": 3}, ValueError, "power must be one of .*; got 3"),
        ({"power": True}, TypeError, "power must be a whole number; got True"),
    ],
)
def test_config_refuses(options: Any, error: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        ff.FishConfig(**options)
    header = {"format": "fishfast.config", "format_version": 1}
    (tmp_path / "c.json").write_text(json.dumps({**header, **options}))
    with pytest.raises(ValueError, match=r"c\.json': " + match):
        ff.FishConfig.from_json_file(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not a JSON file"),
        ("[1]", "must be a fishfast.config file"),
        ('{"k": 3}', "must be a fishfast.config file"),
        ('{"format": "fishfast.config", "format_version": 2}', "has format_version 2; this fish"),
        ('{"format": "fishfast.config", "format_version": true}', "has format_version True; this"),
        (
            '{"format": "fishfast.config", "format_version": 1, "kk": 3}',
            "has the unknown field 'kk'; known: .*'k'",
        ),
        (
            '{"format": "fishfast.config", "format_version": 1, "k": 3, "seed": 1, "k": 4}',
            r"c\.json' has the field 'k' twice; delete one of them",
        ),
    ],
    ids=["empty", "list", "no format", "newer", "true", "unknown", "twice"],
)
def test_config_files_that_are_none(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        ff.FishConfig.from_json_file(tmp_path / "c.json")
