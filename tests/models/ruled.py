"""Calls that have a rule, each weight used once and dim 0 the sample: batched as they are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .case import (
    UNUSED,
    Calls,
    Case,
    classify,
    parameter,
    per_sample,
    sequences,
    token_ids,
    vectors,
)  # fmt: skip
from .layers import convnet_with_norms


def mlp():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 4))
    return Case(model, vectors(5, 3, 1), classify)


def linear_over_positions():
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
    return Case(model, sequences(4, 2), per_sample)


def linear_over_a_grid():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return Case(model, [torch.randn(3, 2, 5, 8), torch.randn(2, 4, 3, 8)], per_sample)


class TokenClassifier(nn.Module):
    def __init__(self, **embedding):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, **embedding)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)).mean(1))


def embedding(**options):
    batches = [(tokens, torch.randint(0, 4, (len(tokens),))) for tokens in token_ids(4, 3, 1)]
    batches[0][0][1] = 2  # one token seven times
    batches[0][0][2] = 0  # nothing but padding, where that is 0
    return Case(TokenClassifier(**options), batches, classify)


def embedding_of_padding_only():
    case = embedding(padding_idx=0)
    for tokens, _ in case.batches:
        tokens.zero_()
    return case


def embedding_called_with_negative_padding():
    class Functional(TokenClassifier):
        def forward(self, tokens):
            rows = F.embedding(tokens.int(), self.embedding.weight, padding_idx=-9)
            return self.head(self.norm(rows).mean(1))

    case = embedding()
    case.model.__class__ = Functional
    return case


def half_frozen():
    case = convnet_with_norms()
    case.model[0].weight.requires_grad_(False)
    case.model[1].requires_grad_(False)
    case.model[5].bias.requires_grad_(False)
    return case


def biases_only():
    case = mlp()
    for name, p in case.model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return case


def head_only():
    case = convnet_with_norms()
    case.model[:-1].requires_grad_(False)
    return case


def residual_in_place():
    def run(self, x):
        out = self.inner(x)
        out += x
        out.relu_()
        return self.outer(out)

    model = Calls(run, inner=nn.Linear(6, 6), outer=nn.Linear(6, 4))
    return Case(model, vectors(4, 2), classify)


def zero_head():
    """A head that starts at zero hides the layers below it in the first look at them."""
    case = mlp()
    with torch.no_grad():
        case.model[3].weight.zero_()
    return case


def called_by_keywords():
    def run(self, x):
        x = F.linear(bias=self.linear.bias, weight=self.linear.weight, input=x)
        x = F.layer_norm(
            weight=self.norm.weight, input=x, normalized_shape=[6], bias=self.norm.bias
        )
        x = x.view(-1, 1, 2, 3)
        return F.conv2d(stride=2, weight=self.conv.weight, input=x, bias=self.conv.bias).flatten(1)

    model = Calls(run, linear=nn.Linear(6, 6), norm=nn.LayerNorm(6), conv=nn.Conv2d(1, 4, 2))
    return Case(model, vectors(4, 3), classify)


def matrix_products():
    """Every way of writing a product with a matrix of parameters on the right."""

    def run(self, x):
        x = torch.tanh(x @ self.a)
        x = torch.tanh(torch.matmul(x, self.b) + x.matmul(self.c))
        x = torch.tanh(torch.mm(x, self.d) + x.mm(self.e))
        return torch.addmm(self.shift, x, self.f) + self.offset.addmm(x, self.g)

    weights = {name: parameter(6, 6) for name in "abcde"} | {n: parameter(6, 4) for n in "fg"}
    model = Calls(run, **weights, shift=parameter(4), offset=parameter(4))
    return Case(model, vectors(4, 3), classify)


def matmul_over_positions():
    model = Calls(
        lambda self, x: torch.tanh(x @ self.matrix) @ self.head,
        matrix=parameter(8, 6), head=parameter(6, 3),
    )  # fmt: skip
    return Case(model, sequences(4, 3), per_sample)


def weight_on_the_left():
    """``W @ x`` mixes positions, as MLP-Mixer does, or features that come as columns."""

    def run(self, x):
        return torch.matmul(self.features, torch.tanh(self.tokens @ x).mT)

    model = Calls(run, tokens=parameter(4, 5), features=parameter(3, 8))
    return Case(model, sequences(4, 3), per_sample)


def transposed_linear():
    """A weight that is kept as [I, O], in every way to turn it."""

    def run(self, x):
        x = F.linear(x, self.a.T) + F.linear(x, self.b.t(), self.bias)
        return F.linear(F.linear(torch.tanh(x), self.c.transpose(0, 1)), self.d.permute(1, 0))

    shapes = {"a": (8, 6), "b": (8, 6), "c": (6, 5), "d": (5, 3), "bias": (6,)}
    model = Calls(run, **{name: parameter(*shape) for name, shape in shapes.items()})
    return Case(model, sequences(4, 3), per_sample)


def unused_branch():
    def run(self, x):
        self.unused(x)
        return self.used(x)

    model = Calls(run, used=nn.Linear(6, 4), unused=nn.Linear(6, 4), bare=parameter(3))
    return Case(model, vectors(3, 2), classify, roads={"unused*": UNUSED, "bare": UNUSED})


def touched_by_some_batches():
    """A branch that the first batch does not take."""

    def run(self, x):
        return self.head(self.branch(x) if x[0, 0] > 0 else x)

    model = Calls(run, branch=nn.Linear(6, 6), head=nn.Linear(6, 4))
    batches = vectors(3, 4, 2)
    for (x, _), sign in zip(batches, (-1, 1, -1), strict=True):
        x[:, 0] = sign
    return Case(model, batches, classify)


class Checkpointed(nn.Module):
    """Blocks that run again in the backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(2)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def not_reentrant(model):
    """Reentrant checkpoints have no torch.autograd.grad, and no gradient above frozen layers."""
    model = copy.deepcopy(model)
    model.use_reentrant = False
    return model


def checkpointed(use_reentrant=False):
    return Case(Checkpointed(use_reentrant), vectors(4, 3), classify, plain=not_reentrant)


def checkpointed_above_frozen_layers():
    case = checkpointed(use_reentrant=True)
    case.model.first.requires_grad_(False)
    return case


def checkpointed_all_the_way():
    """Nothing trained lies outside of the checkpoints; they are nested, and share a weight."""

    def run(self, x):
        inner = functools.partial(checkpoint, self.inner, use_reentrant=False)
        x = checkpoint(lambda x: torch.tanh(inner(torch.tanh(inner(x)))), x, use_reentrant=False)
        return checkpoint(self.head, x, use_reentrant=False)

    model = Calls(run, inner=nn.Linear(6, 6), head=nn.Linear(6, 4))
    return Case(model, vectors(4, 3), classify)


def tuple_of_outputs():
    """Models that return tuples or dicts; outputs that the losses do not use."""

    def run(self, x):
        hidden = torch.tanh(self.body(x))
        return {"logits": (self.head(hidden), hidden), "unused": self.other(hidden)}

    model = Calls(run, body=nn.Linear(6, 6), head=nn.Linear(6, 4), other=nn.Linear(6, 2))

    def loss_fn(model, batch):
        logits, hidden = model(batch[0])["logits"]
        return F.cross_entropy(logits, batch[1], reduction="none") + hidden.square().mean(1)

    return Case(model, vectors(4, 3), loss_fn, roads={"other*": UNUSED})


def losses_of_uneven_size():
    """One sample's loss is a million times the others', another's is zero."""
    case = mlp()

    def loss_fn(model, batch):
        scale = torch.ones(len(batch[0]), device=batch[0].device, dtype=batch[0].dtype)
        scale[batch[1] == 1], scale[batch[1] == 2] = 1e6, 0
        return classify(model, batch) * scale

    case.batches = vectors(5, 4)
    for _, labels in case.batches:
        labels.copy_(torch.arange(len(labels)) % 4)
    case.loss_fn = loss_fn
    return case


def samples_without_labels():
    """Losses of -100 labels are zero; in the first batch all are but one."""
    case = embedding()
    case.batches = case.batches[:2]
    case.batches[0][1][1:] = -100
    return case


RULED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        mlp, linear_over_positions, linear_over_a_grid, embedding, embedding_of_padding_only,
        embedding_called_with_negative_padding, half_frozen, biases_only, head_only,
        residual_in_place, zero_head, called_by_keywords, matrix_products, matmul_over_positions,
        weight_on_the_left, transposed_linear, unused_branch, touched_by_some_batches, checkpointed,
        checkpointed_above_frozen_layers, checkpointed_all_the_way, tuple_of_outputs,
        losses_of_uneven_size, samples_without_labels,
    )
}  # fmt: skip
RULED |= {
    "checkpointed_reentrant": functools.partial(checkpointed, use_reentrant=True),
    "embedding_padding": functools.partial(embedding, padding_idx=0),
    "embedding_padding_from_the_end": functools.partial(embedding, padding_idx=-9),
    "embedding_sparse": functools.partial(embedding, sparse=True),
}
