"""Random lives of a tuned model against a dense float64 model under a mask.

The oracle shares no code with fishfast: a float64 copy of the net, AdamW or SGD written out and
applied where the mask is. After each event the weights must be the oracle's, to the rounding of
fp32, and what no mask ever had must have kept its bits.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import mask_of, same_bits
from torch import Tensor, nn

import fishfast as ff

LR, BETAS, EPS = 0.02, (0.9, 0.999), 1e-3  # an eps that keeps rounding from deciding a sign


class Net(nn.Module):
    """Linear layers, an embedding, a norm, a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 5, bias=False)
        self.head = nn.Linear(5, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(x + self.second(torch.tanh(self.norm(self.first(x)))))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 6, (3, 4), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    return model(tokens(seed)).square().mean()


class Oracle:
    """A dense float64 model of which only masked entries train."""

    def __init__(self, model: nn.Module, mask: ff.SparseMask) -> None:
        self.model = copy.deepcopy(model).double()
        self.base = self.weights()
        self.mask = {name: found.long() for name, found in mask.items()}
        self.kind, self.state = "ff.AdamW", {}

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def backward(self, seed: int) -> None:
        loss_of(self.model, seed).backward()

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            where = self.mask[name]
            if len(where) == 0 or parameter.grad is None:
                continue
            values, grad = parameter.detach().flatten(), parameter.grad.flatten()[where]
            change = grad
            if "AdamW" in self.kind:
                m, v, t = self.state.get(name, (torch.zeros_like(grad), torch.zeros_like(grad), 0))
                m, v, t = m + (1 - BETAS[0]) * (grad - m), v + (1 - BETAS[1]) * (grad**2 - v), t + 1
                self.state[name] = m, v, t
                denominator = (v / (1 - BETAS[1] ** t)).sqrt() + EPS
                change = m / (1 - BETAS[0] ** t) / denominator
            values[where] -= LR * change
        self.model.zero_grad()

    def write(self, name: str, where: Tensor, numbers: Tensor) -> None:
        with torch.no_grad():
            dict(self.model.named_parameters())[name].flatten()[where] = numbers.double()

    def remask(self, mask: ff.SparseMask, restore: bool) -> None:
        after = {name: found.long() for name, found in mask.items()}
        for name, before in self.mask.items():
            if restore:
                leaving = before[~torch.isin(before, after[name])]
                self.write(name, leaving, self.base[name].flatten()[leaving])
            if name in self.state:
                m, v, t = self.state.pop(name)
                stays = torch.isin(after[name], before)
                if stays.any():
                    source = torch.searchsorted(before, after[name][stays])
                    moved = [torch.zeros(len(after[name]), dtype=torch.float64) for _ in (m, v)]
                    for new, old in zip(moved, (m, v), strict=True):
                        new[stays] = old[source]
                    self.state[name] = (*moved, t)
        self.mask = after


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ff.AdamW": lambda p: ff.AdamW(p, lr=LR, betas=BETAS, eps=EPS),
    "ff.SGD": lambda p: ff.SGD(p, lr=LR),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=LR, betas=BETAS, eps=EPS, weight_decay=0),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(
        p, lr=LR, betas=BETAS, eps=EPS, weight_decay=0, fused=True
    ),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=LR),
}


class Life:
    """A tuned model and its oracle, to which the same things happen."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        torch.manual_seed(seed)
        model = Net()
        mask = self.some_mask(model)
        self.oracle = Oracle(model, mask)
        self.tuned = ff.train_only(model, mask, dense_gradient_limit=self.choose.choice([0, 2**20]))
        self.optimizer = MAKERS["ff.AdamW"](self.tuned.parameters())
        self.untouched = {name: p.detach().clone() for name, p in model.named_parameters()}

    def some_mask(self, model: nn.Module) -> ff.SparseMask:
        indices = {}
        for name, p in model.named_parameters():
            if not name.endswith("_values"):
                chance = self.choose.choice([0.0, 0.2, 0.6, 1.0])
                indices[name] = (torch.rand(p.numel()) < chance).nonzero().flatten().int()
        if not any(map(len, indices.values())):
            indices["first.weight"] = torch.tensor([0, 3], dtype=torch.int32)
        return mask_of(model, indices)

    # --- events ---

    def steps(self) -> None:
        for _ in range(self.choose.randint(1, 3)):
            self.optimizer.zero_grad(set_to_none=self.choose.random() < 0.7)
            for _ in range(self.choose.randint(1, 2)):  # accumulation
                seed = self.choose.randrange(100)
                loss_of(self.tuned.model, seed).backward()
                self.oracle.backward(seed)
            self.optimizer.step()
            self.oracle.step()

    def other_optimizer(self) -> None:
        self.oracle.kind = self.choose.choice(list(MAKERS))
        self.optimizer = MAKERS[self.oracle.kind](self.tuned.parameters())
        self.oracle.state = {}

    def save_and_load_all(self) -> None:
        if self.choose.random() < 0.5:
            self.tuned.attach(self.optimizer)
        saved = io.BytesIO()
        torch.save((self.tuned.model.state_dict(), self.optimizer.state_dict()), saved)
        saved.seek(0)
        loads = [self.tuned.model.load_state_dict, self.optimizer.load_state_dict]
        pairs = list(zip(loads, torch.load(saved, weights_only=True), strict=True))
        for load, state in pairs[:: self.choose.choice([1, -1])]:
            load(state)

    def base_loaded_again(self) -> None:
        state = {name: tensor.float() for name, tensor in self.oracle.base.items()}
        self.tuned.model.load_state_dict({**self.tuned.model.state_dict(), **state})
        for name, tensor in self.oracle.base.items():
            self.oracle.write(name, torch.arange(tensor.numel()), tensor.flatten())

    def values_written(self) -> None:
        """As an average of parameters, or a clamp."""
        for name, values in self.tuned.named_parameters():
            name = name.removesuffix("_values")
            numbers = torch.randn(len(values)) * 0.3
            if self.choose.random() < 0.5:
                with torch.no_grad():
                    values.copy_(numbers)
            else:
                values.data = numbers.clone()
            self.oracle.write(name, self.oracle.mask[name], numbers)

    def weights_written(self) -> None:
        with torch.no_grad():
            for name, p in self.tuned.model.named_parameters():
                if name in self.oracle.mask and len(self.oracle.mask[name]):
                    where = self.oracle.mask[name][:2]
                    p.flatten()[where] = 0.25
                    self.oracle.write(name, where, torch.full((len(where),), 0.25))
        self.tuned.model.state_dict()

    def copied(self) -> None:
        if self.choose.random() < 0.5:
            self.tuned, self.optimizer = copy.deepcopy((self.tuned, self.optimizer))
        else:
            saved = io.BytesIO()
            torch.save((self.tuned, self.optimizer), saved)
            saved.seek(0)
            self.tuned, self.optimizer = torch.load(saved, weights_only=False)

    def moved(self) -> None:
        self.choose.choice([
            lambda: self.tuned.model.to("cpu"),
            lambda: self.tuned.model.share_memory(),
            lambda: self.tuned.model.to(memory_format=torch.contiguous_format),
        ])()  # fmt: skip

    def looked_at(self) -> None:
        with self.tuned.disabled(), torch.no_grad():
            found = dict(self.tuned.model.named_parameters())
            for name, tensor in self.oracle.base.items():
                assert same_bits(found[name].detach(), tensor.float()), name
        with self.tuned.released() as plain, torch.no_grad():
            loss_of(plain, 0)

    def remasked(self) -> None:
        with self.tuned.released() as plain:
            mask = self.some_mask(plain)
        restore = self.choose.random() < 0.5
        self.tuned.remask(mask, "restore" if restore else "keep", optimizer=self.optimizer)
        self.oracle.remask(mask, restore)

    EVENTS = (
        steps, steps, steps, other_optimizer, save_and_load_all, base_loaded_again, values_written,
        weights_written, copied, moved, looked_at, remasked,
    )  # fmt: skip

    def check(self) -> None:
        state = self.tuned.model.state_dict()
        exact = dict(self.oracle.model.named_parameters())
        for name, tensor in exact.items():
            found = state[name].double()
            assert torch.allclose(found, tensor.detach(), rtol=2e-4, atol=2e-4), name
            never = torch.ones(tensor.numel(), dtype=torch.bool)
            never[self.tuned.trained_mask[name].long()] = False
            kept = self.untouched[name].flatten()[never]
            assert same_bits(state[name].flatten()[never], kept), name


def live(seed: int, events: int = 12) -> None:
    life = Life(seed)
    told = []
    try:
        for _ in range(events):
            event = life.choose.choice(Life.EVENTS)
            told.append(event.__name__)
            event(life)
            life.check()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {' > '.join(told)}") from error


@pytest.mark.parametrize("seed", range(0, 200, 8))
def test_a_life_is_that_of_a_dense_model(seed: int) -> None:
    live(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", [seed for seed in range(200) if seed % 8])
def test_more_lives(seed: int) -> None:
    live(seed)
