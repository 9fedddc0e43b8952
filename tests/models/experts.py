"""Mixtures of experts: stacks of weights, and tokens that go to some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import MEETS_DATA, SORTED, Calls, Case, parameter, per_sample, sequences

NUM_EXPERTS = 3


def route(x):
    """Two experts for each token ``[N, D]``, by its own numbers alone, and their weights."""
    first = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    chosen = torch.stack((first, (first + 1) % NUM_EXPERTS), 1)
    return chosen, torch.sigmoid(x[:, 2:4])


def in_a_loop(self, x, chosen, weights):
    """As transformers does it: expert by expert, the tokens that chose it, added up."""
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        tokens, place = torch.where(chosen == expert)
        hidden = torch.tanh(F.linear(x[tokens], self.up[expert], self.bias[expert]))
        hidden = hidden @ self.down[expert] * weights[tokens, place, None]
        out.index_add_(0, tokens, hidden.to(out.dtype))
    return out


def grouped(self, x, chosen, weights):
    """Sorted by expert, in one call: not in float64 on a CPU, where the oracle runs a loop."""
    if x.dtype == torch.float64:
        return in_a_loop(self, x, chosen, weights)
    order = chosen.flatten().argsort(stable=True)
    tokens = order // chosen.shape[1]
    experts = chosen.flatten()[order]
    ends = torch.bincount(experts, minlength=NUM_EXPERTS).cumsum(0).int()
    hidden = F.grouped_mm(x[tokens], self.up.transpose(1, 2), offs=ends)
    hidden = torch.tanh(hidden + self.bias[experts])
    hidden = F.grouped_mm(hidden, self.down, offs=ends) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, tokens, hidden)


def batched(self, x, chosen, weights):
    """A weight for each token."""
    hidden = torch.bmm(self.up[chosen.flatten()], x.repeat_interleave(2, 0).unsqueeze(-1))
    hidden = torch.tanh(hidden.squeeze(-1) + self.bias[chosen.flatten()])
    hidden = torch.bmm(hidden.unsqueeze(1), self.down[chosen.flatten()]).squeeze(1)
    return (hidden.unflatten(0, chosen.shape) * weights[..., None]).sum(1)


def all_of_them(self, x, chosen, weights):
    """Every expert sees every token; what was not chosen is multiplied by zero."""
    every = x.expand(NUM_EXPERTS, -1, -1)
    hidden = torch.tanh(torch.bmm(every, self.up.transpose(1, 2)) + self.bias.unsqueeze(1))
    hidden = torch.bmm(hidden, self.down)
    share = x.new_zeros(len(x), NUM_EXPERTS).scatter(1, chosen, weights)
    return (hidden * share.T.unsqueeze(-1)).sum(0)


def by_masks(self, x, chosen, weights):
    """Products with a matrix of ones and zeros send the tokens to the experts, and back."""
    sent = F.one_hot(chosen, NUM_EXPERTS).to(x).flatten(0, 1)  # [N * 2, E]
    slots = torch.stack([torch.diag(sent[:, e]) for e in range(NUM_EXPERTS)])  # [E, N * 2, N * 2]
    inputs = slots @ x.repeat_interleave(2, 0)
    hidden = [
        torch.tanh(F.linear(inputs[e], self.up[e], self.bias[e])) @ self.down[e]
        for e in range(NUM_EXPERTS)
    ]
    back = sum(slots[e].T @ h for e, h in enumerate(hidden))
    return (back.unflatten(0, chosen.shape) * weights[..., None]).sum(1)


def experts(way, roads, fallback=()):
    def run(self, x):
        flat = self.inner(x).flatten(0, 1)
        # By the inputs, so that rounding sends no token elsewhere.
        out = way(self, flat, *route(x.flatten(0, 1)))
        return self.head(out.unflatten(0, x.shape[:2]))

    model = Calls(
        run, inner=nn.Linear(8, 8), head=nn.Linear(8, 3), up=parameter(NUM_EXPERTS, 16, 8),
        bias=parameter(NUM_EXPERTS, 16), down=parameter(NUM_EXPERTS, 16, 8),
    )  # fmt: skip
    return Case(model, sequences(3, 4, 2), per_sample, set(fallback), roads)


def experts_without_tokens():
    """An expert that nobody chooses, and one that the first batch does not choose."""
    case = experts(in_a_loop, {"up": SORTED, "bias": SORTED, "down": SORTED})
    for x in case.batches:
        x[..., :2] = -x[..., :2].abs()  # experts 0 and 1
    case.batches[1][0, 2, :2] = 1  # experts 2 and 0
    return case


class RoutedLayers(nn.Module):
    """Experts that are modules, called with the tokens ``[N, D]`` that chose them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        flat = x.flatten(0, 1)
        out = torch.zeros_like(flat)
        for expert, mine in zip(self.experts, (flat[:, 0] > 0, flat[:, 0] <= 0), strict=True):
            out = out.index_put((mine,), torch.tanh(expert(flat[mine])))
        return self.head(out.view_as(x))


def routed_tokens(*batches):
    """Each batch: for every sample the signs that send its tokens to expert 0 or 1."""
    case = Case(RoutedLayers(), [], per_sample, roads={"experts.*": "batched*"})
    for rows in batches:
        signs = torch.tensor([[1.0 if s == "0" else -1.0 for s in row] for row in rows])
        x = torch.randn(*signs.shape, 8)
        x[..., 0] = x[..., 0].abs() * signs
        case.batches.append(x)
    return case


# The first batch shows a regular order that the next ones have the sizes of, but do not follow.
ROUTED_TOKENS = {
    "routed_tokens": (["0110", "1001", "0000"], ["1010", "0111"]),
    "all_tokens_to_one_expert_first": (
        ["0000", "0000"],
        ["00111111", "00000011"],
        ["0100", "0101"],
    ),
    "one_token_of_each_sample_first": (["0111", "0111", "0111"], ["1010", "1111", "0111"]),
    "all_to_one_then_two_of_one_sample": (["0", "0", "0"], ["010", "111", "011"]),
    "the_last_expert_gets_all_tokens_first": (["1111", "1111"], ["1101", "0111"], ["1011", "1101"]),
}


def sorted_by_expert(first):
    """One call over all tokens, in the order of their experts: regular as long as one gets all."""

    def run(self, x):
        flat = x.flatten(0, 1)
        order = (flat[:, 0] > 0).long().argsort(stable=True)
        out = torch.tanh(self.body(flat[order]))
        return self.head(out[order.argsort()].view_as(x))

    case = Case(
        Calls(run, body=nn.Linear(8, 8), head=nn.Linear(8, 3)), sequences(3, 3, 2), per_sample,
        roads={"body.*": SORTED},
    )  # fmt: skip
    if first == "regular":
        case.batches[0][..., 0].abs_()
    return case


EXPERTS: dict[str, Callable[[], Case]] = {
    "experts_without_tokens": experts_without_tokens,
    "experts_in_a_loop": functools.partial(
        experts, in_a_loop, {"up": SORTED, "bias": SORTED, "down": SORTED}
    ),
    "experts_grouped": functools.partial(
        experts, grouped, {"up": SORTED, "bias": SORTED, "down": SORTED}
    ),
    "experts_batched": functools.partial(
        experts, batched, {"up": MEETS_DATA, "bias": MEETS_DATA, "down": MEETS_DATA}
    ),
    "experts_all": functools.partial(experts, all_of_them, {}, ("up", "bias", "down")),
    "experts_by_masks": functools.partial(experts, by_masks, {}),
    "sorted_by_expert": functools.partial(sorted_by_expert, "irregular"),
    "sorted_by_expert_after_a_regular_batch": functools.partial(sorted_by_expert, "regular"),
}
EXPERTS |= {
    name: functools.partial(routed_tokens, *batches) for name, batches in ROUTED_TOKENS.items()
}
