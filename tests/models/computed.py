"""Weights that a forward computes from parameters, and parameters in elementwise calls."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .case import (
    MEETS_DATA,
    Calls,
    Case,
    classify,
    parameter,
    per_sample,
    sequences,
    token_ids,
    vectors,
)  # fmt: skip


def at_least_fp32(tensor):
    """Return what ``tensor.float()`` would, but leave the oracle its float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Written as a plain multiply, the weight on either side, and as Gemma does."""

    def __init__(self, width, way="weight first"):
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.ones(width)), way

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if self.way == "gemma":
            return (at_least_fp32(x) * (1.0 + at_least_fp32(self.weight))).to(x.dtype)
        return self.weight * x if self.way == "weight first" else x.mul_(self.weight)


def rms_norms_as_products():
    model = nn.Sequential(
        nn.Linear(8, 6), RMSNorm(6), nn.Linear(6, 6), RMSNorm(6, "in place"), nn.Linear(6, 6),
        RMSNorm(6, "gemma"), nn.Linear(6, 3),
    )  # fmt: skip
    roads = {f"{i}.weight": MEETS_DATA for i in (1, 3, 5)}
    return Case(model, sequences(4, 3), per_sample, roads=roads)


def other_norms():
    model = nn.Sequential(
        nn.Linear(8, 6), RMSNorm(6), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 6),
        nn.Unflatten(2, (6, 1)), nn.Flatten(1, 2), nn.GroupNorm(5, 30),
    )  # fmt: skip
    return Case(model, sequences(3, 2), per_sample, roads={"1.weight": MEETS_DATA})


def scales_and_shifts():
    """Elementwise calls of every kind, with operands that broadcast in every way."""

    def run(self, x):
        x = self.linear(x) * self.one + self.row
        x = torch.addcmul(x, self.column, torch.tanh(x)) - self.grid
        x = torch.where(x > 0, x, x * self.slope)
        x = torch.maximum(x, self.floor) / (1 + self.below.square())
        x = torch.lerp(x, self.target, self.share.sigmoid())
        return (0.1 + x.square()) ** torch.sigmoid(self.power)

    shapes = {
        "one": (), "row": (6,), "column": (5, 1), "grid": (1, 5, 6), "slope": (6,),
        "floor": (5, 6), "below": (1, 1, 1), "target": (6,), "share": (1,), "power": (),
    }  # fmt: skip
    model = Calls(
        run, linear=nn.Linear(8, 6), **{name: parameter(*shape) for name, shape in shapes.items()}
    )  # fmt: skip

    return Case(model, sequences(4, 3), per_sample, roads={"linear*": "batched", "*": MEETS_DATA})


def shifts_in_place():
    def run(self, x):
        x = self.linear(x)
        x += self.shift
        x *= self.scale
        x.sub_(self.other).div_(self.divisor)
        return self.head(x)

    model = Calls(
        run, linear=nn.Linear(6, 6), head=nn.Linear(6, 4), shift=parameter(6), scale=parameter(1),
        other=parameter(6), divisor=nn.Parameter(1 + torch.rand(6)),
    )  # fmt: skip
    roads = {name: MEETS_DATA for name in ("shift", "scale", "other", "divisor")}
    return Case(model, vectors(4, 3), classify, roads=roads)


def bare_parameters():
    def run(self, x):
        return (self.linear(x) * self.scale + self.shift) @ self.matrix

    model = Calls(
        run, linear=nn.Linear(6, 6), scale=parameter(), shift=parameter(6), matrix=parameter(6, 4)
    )  # fmt: skip
    return Case(
        model, vectors(3, 2), classify, roads={"scale": MEETS_DATA, "shift": MEETS_DATA}
    )  # fmt: skip


def layer_scales():
    """ConvNeXt's and CaiT's: a vector times a branch."""

    def run(self, x):
        for gamma, layer in zip(self.gammas, self.layers, strict=True):
            x = x + gamma * layer(torch.tanh(x))
        return x

    gammas = nn.ParameterList(parameter(8) for _ in range(2))
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    model = Calls(run, gammas=gammas, layers=layers)
    return Case(model, sequences(4, 3), per_sample, roads={"gammas.*": MEETS_DATA})


def state_space():
    """Mamba's scan: ``exp(A_log)`` and D meet the data, a bias is added to the step."""

    def run(self, x):
        steps = F.softplus(x @ self.rate + self.rate_bias)  # [B, T, D]
        decay = -torch.exp(at_least_fp32(self.a_log))  # [D, S]
        b, c = self.read(x).chunk(2, -1)
        state, outs = 0.0, []
        for t in range(x.shape[1]):
            state = state * torch.exp(steps[:, t, :, None] * decay)
            state = state + (steps[:, t] * x[:, t])[..., None] * b[:, t, None]
            outs.append((state * c[:, t, None]).sum(-1) + self.skip * x[:, t])
        return torch.stack(outs, 1)

    model = Calls(
        run, rate=parameter(8, 8), rate_bias=parameter(8), a_log=parameter(8, 3), skip=parameter(8),
        read=nn.Linear(8, 6, bias=False),
    )  # fmt: skip
    roads = {name: MEETS_DATA for name in ("rate_bias", "a_log", "skip")}
    return Case(model, sequences(4, 3), per_sample, roads=roads)


def weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))
    return Case(model, vectors(3, 2), classify, roads={"0.param*": MEETS_DATA})


def weight_norm_of_a_convolution():
    conv = parametrizations.weight_norm(nn.Conv1d(8, 6, 3, groups=2), dim=2)
    model = Calls(lambda self, x: torch.tanh(self.conv(x.transpose(1, 2))), conv=conv)
    return Case(model, sequences(4, 3), per_sample, roads={"conv.param*": MEETS_DATA})


def spectral_norm():
    """In eval mode the vectors of the power iteration are fixed, and the norm depends on W."""
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)
    )  # fmt: skip
    return Case(model, vectors(3, 2), classify, roads={"0.param*": MEETS_DATA})


def orthogonal():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 4))
    names = {"0.bias", "0.parametrizations.weight.original"}
    return Case(model, vectors(3, 2), classify, names)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def symmetric_weight_cached():
    """A parametrization that is run once for two calls."""

    def run(self, x):
        with parametrize.cached():
            return self.linear(torch.tanh(self.linear(x)))

    linear = nn.Linear(6, 6)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return Case(Calls(run, linear=linear), vectors(3, 2), classify, roads={"*.param*": MEETS_DATA})


def pruned():
    """A mask is a buffer times the weight, as torch.nn.utils.prune and BitFit-like methods do."""
    masks = {
        f"mask_{i}": (torch.rand(shape) > 0.5).float() for i, shape in enumerate(((6, 6), (4,)))
    }

    def run(self, x):
        x = torch.tanh(F.linear(x, self.first.weight * self.mask_0, self.first.bias))
        return F.linear(x, self.head.weight, self.mask_1 * self.head.bias)

    model = Calls(run, first=nn.Linear(6, 6), head=nn.Linear(6, 4), **masks)
    roads = {"first.weight": MEETS_DATA, "head.bias": MEETS_DATA}
    return Case(model, vectors(3, 2), classify, roads=roads)


def low_rank_updates():
    """LoRA, merged into the weight and beside it; B starts at zero, so A has no gradient."""

    def run(self, x):
        x = torch.tanh(F.linear(x, self.w + self.b @ self.a))
        return self.head(x) + 0.5 * F.linear(F.linear(x, self.down), self.up)

    frozen = nn.Linear(6, 4).requires_grad_(False)
    model = Calls(
        run, w=torch.randn(6, 6), head=frozen, a=parameter(2, 6), b=parameter(6, 2),
        down=parameter(2, 6), up=parameter(4, 2),
    )  # fmt: skip
    case = Case(model, vectors(4, 3), classify, roads={"a": MEETS_DATA, "b": MEETS_DATA})
    with torch.no_grad():
        model.b.zero_()
        model.up.zero_()
    return case


def written_weights():
    """Weights that are put together in place: rows and corners come from other parameters."""

    def run(self, x):
        first = self.first.clone()
        first[0] = self.row
        first[:, 1:3].mul_(self.scale)
        second = torch.zeros(4, 6, dtype=x.dtype, device=x.device)
        second[:2], second[2:] = self.upper, self.upper * self.scale[0]
        return F.linear(torch.tanh(F.linear(x, first)), second)

    model = Calls(
        run, first=parameter(6, 6), row=parameter(6), scale=parameter(2), upper=parameter(2, 6)
    )  # fmt: skip
    return Case(model, vectors(4, 3), classify, {"first", "row", "scale", "upper"})


def filters_in_the_frequency_domain():
    """Weights that are pairs of reals, seen as complex numbers."""

    def run(self, x):
        spectrum = torch.fft.rfft(self.inner(x), dim=1) * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))

    model = Calls(run, inner=nn.Linear(8, 6), head=nn.Linear(6, 3), filter=parameter(3, 6, 2))
    return Case(model, sequences(4, 3), per_sample, {"filter"})


def fake_quantised():
    """A weight of integers and scales; the rounding passes its gradient on."""

    def run(self, x):
        steps = self.weight / self.scale
        rounded = steps + (steps.round() - steps).detach()
        return F.linear(x, rounded * self.scale)

    model = Calls(run, weight=parameter(4, 6), scale=nn.Parameter(0.5 + torch.rand(4, 1)))
    return Case(model, vectors(4, 3), classify, roads={"*": MEETS_DATA})


def weight_of_a_small_network():
    """A hypernetwork without inputs: its layers see no data at all."""

    def run(self, x):
        weight = self.second(torch.tanh(self.first(self.code))).view(4, 6)
        return F.linear(x, weight)

    model = Calls(run, first=nn.Linear(3, 5), second=nn.Linear(5, 24), code=parameter(3))
    return Case(model, vectors(4, 3), classify, roads={"*": MEETS_DATA})


def recurrent(kind):
    """The weights of cuDNN go through one call, whose output belongs to the samples again."""
    width, options = 5, {"batch_first": True}
    if kind == "lstm":
        options |= {"num_layers": 2}
    elif kind == "gru":
        options |= {"bidirectional": True}
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](8, width, **options)
    width *= 2 if layer.bidirectional else 1
    model = Calls(
        lambda self, x: self.head(self.rnn(x)[0][:, -1]), rnn=layer, head=nn.Linear(width, 4)
    )  # fmt: skip
    return Case(model, sequences(3, 2), per_sample, roads={"rnn.*": MEETS_DATA})


def recurrent_cell():
    """Written step by step: the cell is called once for each position."""

    def run(self, x):
        state = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state)

    model = Calls(run, cell=nn.GRUCell(8, 5), head=nn.Linear(5, 4))
    return Case(model, sequences(3, 2), per_sample, roads={"cell.*": MEETS_DATA})


def embedding_bag():
    model = nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 4))
    return Case(model, token_ids(3, 2), per_sample, roads={"0.weight": MEETS_DATA})


def renormalised_embedding():
    """``max_norm`` by hand: no forward may change the table."""

    def run(self, tokens):
        norms = self.table.norm(dim=1, keepdim=True).clamp(min=1.0)
        return self.head(F.embedding(tokens, self.table / norms).mean(1))

    model = Calls(run, table=parameter(11, 6), head=nn.Linear(6, 4))
    return Case(model, token_ids(3, 2), per_sample, roads={"table": MEETS_DATA})


COMPUTED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        rms_norms_as_products, other_norms, scales_and_shifts, shifts_in_place, bare_parameters,
        layer_scales, state_space, weight_norm, weight_norm_of_a_convolution, spectral_norm,
        orthogonal, symmetric_weight_cached, pruned, low_rank_updates, fake_quantised,
        weight_of_a_small_network, written_weights,
        filters_in_the_frequency_domain, recurrent_cell, embedding_bag, renormalised_embedding,
    )
}  # fmt: skip
COMPUTED |= {kind: functools.partial(recurrent, kind) for kind in ("lstm", "gru", "rnn")}
