"""Modules that use their weights in every way, and what a plain backward makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import mask_of, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fishfast as ff


def mask_over_all(model: nn.Module, density: float = 0.3) -> ff.SparseMask:
    """Return a mask with some entries of every parameter."""
    generator = torch.Generator().manual_seed(7)
    indices = {}
    for name, p in model.named_parameters():
        order = torch.randperm(p.numel(), generator=generator)
        indices[name] = order[: max(1, int(density * p.numel()))].sort().values.int()
    return mask_of(model, indices)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Bare(nn.Module):
    """Parameters used directly: expanded, indexed, transposed, as a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(numbers(6))
        self.cls = nn.Parameter(numbers(1, 1, 6, seed=1))
        self.position = nn.Parameter(numbers(9, 6, seed=2))
        self.experts = nn.Parameter(numbers(2, 6, 5, seed=3))
        self.zero_dim = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position[: x.shape[1] + 1]
        return (x * self.scale * self.zero_dim) @ self.experts[1] + x @ self.experts[0]


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(numbers(6, 6, seed=i)) for i in range(3)])
        self.named = nn.ParameterDict(
            {"a": nn.Parameter(numbers(6)), "b": nn.Parameter(numbers(6))}
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = (x @ part).tanh()
        return x * self.named["a"] + sum(self.named.values())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return checkpoint(self.second, x, use_reentrant=self.use_reentrant)


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = cls(6, 5, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))


def old_weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))


def spectral_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Linear(4, 2))


def orthogonal() -> nn.Module:
    return nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def own_parametrization() -> nn.Module:
    model = nn.Linear(6, 6)
    nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    return model


def channels_last_conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(5))
SEQUENCE = numbers(4, 7, 6)
IMAGES = numbers(2, 3, 8, 8)
ENCODER = {"batch_first": True, "dropout": 0.0}

MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), SEQUENCE),
    "bilinear": (lambda: PairOfSelf(nn.Bilinear(6, 6, 3)), SEQUENCE),
    "conv1d": (lambda: nn.Conv1d(7, 4, 3, groups=1), SEQUENCE),
    "conv2d, groups": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), IMAGES),
    "conv2d, channels_last": (channels_last_conv, IMAGES),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), IMAGES),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGES),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), SEQUENCE),
    "group norm": (lambda: nn.GroupNorm(3, 3), IMAGES),
    "prelu": (lambda: nn.PReLU(7), SEQUENCE),
    "embedding": (lambda: nn.Embedding(11, 6), TOKENS),
    "embedding, padding": (lambda: nn.Embedding(11, 6, padding_idx=int(TOKENS[0, 0])), TOKENS),
    "embedding bag": (lambda: nn.EmbeddingBag(11, 6), TOKENS),
    "tied": (TiedNet, TOKENS),
    "called twice": (CalledTwice, SEQUENCE),
    "bare parameters": (Bare, SEQUENCE),
    "lists and dicts": (Containers, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE),
    "lstm, projection": (lambda: Recurrent(nn.LSTM, proj_size=3), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN, bias=False), SEQUENCE),
    "lstm cell": (lambda: Cell(nn.LSTMCell(6, 5)), SEQUENCE[:, 0]),
    "attention": (Attention, SEQUENCE),
    "attention, kdim": (lambda: Attention(kdim=6, vdim=6, add_bias_kv=True), SEQUENCE),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, **ENCODER), SEQUENCE),
    "encoder layer, eval": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, **ENCODER).eval(),
        SEQUENCE,
    ),
    "encoder, eval": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, **ENCODER), 2).eval(),
        SEQUENCE,
    ),
    "weight_norm": (weight_normed, SEQUENCE),
    "weight_norm by hooks": (old_weight_normed, SEQUENCE),
    "spectral_norm": (spectral_normed, SEQUENCE),
    "orthogonal": (orthogonal, SEQUENCE),
    "own parametrization": (own_parametrization, SEQUENCE),
    "checkpoint, reentrant": (lambda: Checkpointed(True), SEQUENCE),
    "checkpoint": (lambda: Checkpointed(False), SEQUENCE),
}


class PairOfSelf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class Cell(PairOfSelf):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, data = MODULES[name]
    return make(), data


def copy_without_tap(model: nn.Module, name: str) -> nn.Module:
    # Made again rather than copied: old weight_norm's computed weights cannot be deep-copied.
    twin = built(name)[0] if name in MODULES else copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    return twin


def dense_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_tap_is_exact(
    tuned: ff.SparseTuning, expected: dict[str, Tensor], run: Callable[[nn.Module], Tensor]
) -> None:
    run(tuned.model).backward()
    compared = 0
    summed = biases_of_convolutions(tuned.model)
    for name, values in tuned.named_parameters():
        name = name.removesuffix("_values")
        if name in summed:
            continue
        if name not in expected:
            assert values.grad is None or not values.grad.any(), name
            continue
        assert same_bits(values.grad, expected[name].flatten()[tuned.mask[name].long()]), name
        compared += bool(values.grad.any())
    assert compared > 0
    for name, parameter in tuned.model.named_parameters():
        assert name.endswith("_values") or parameter.grad is None


def biases_of_convolutions(model: nn.Module) -> set[str]:
    """Return the parameters whose gradient is a sum of our own, in another order than torch's."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        f"{name}.bias".lstrip(".") for name, m in model.named_modules() if isinstance(m, layers)
    }


def square_loss(data: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(data).square().sum()
