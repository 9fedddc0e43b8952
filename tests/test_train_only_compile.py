"""torch.compile of a tuned model and of a whole training step: the optimizer is one graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sparse_optimizer_makers import MAKERS, Make, half_mask, small_net
from stepping import assert_state, state_of
from torch import Tensor, nn
from train_only_modules import TOKENS, TiedNet, mask_over_all, square_loss
from train_only_net import assert_masters_match

import fishfast as ff

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6 cannot compile through the tap"
)


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    """Dynamo's counts, from zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


def two_runs(
    make: Callable[[ff.SparseTuning], torch.optim.Optimizer],
) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    runs = []
    for _ in range(2):
        model = small_net()
        runs.append((model, make(ff.train_only(model, half_mask(model)))))
    return runs


def batches(count: int) -> Iterator[Tensor]:
    for seed in range(count):
        yield torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))


@MAKERS
def test_training_a_compiled_model_equals_training_it(make: Make, counters: Any) -> None:
    (plain, reference), (model, optimizer) = two_runs(lambda tuned: make(tuned.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in batches(4):
        for net, run, stepper in ((plain, plain, reference), (model, compiled, optimizer)):
            stepper.zero_grad()
            run(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            stepper.step()
        assert_state(model, state_of(plain))
    # In place: new weights are no reason to compile again.
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_tied_model_in_train_and_eval_mode() -> None:
    """Without gradients the weights are read past the tap: another graph, the same bits."""
    torch.manual_seed(0)
    model = TiedNet()
    tuned = ff.train_only(model, mask_over_all(model))
    optimizer = ff.AdamW(tuned.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            model.eval()
            before = compiled(TOKENS)
            assert torch.equal(before, model(TOKENS))
            model.train()
        optimizer.zero_grad()
        square_loss(TOKENS)(compiled).backward()
        optimizer.step()
        assert not torch.equal(compiled(TOKENS), before)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiled_training_step(backend: str, counters: Any) -> None:
    (plain, reference), (model, optimizer) = two_runs(
        lambda tuned: ff.AdamW(tuned.parameters(), lr=0.05, backend=backend)
    )
    compiled = torch.compile(training_step, backend="aot_eager")
    for batch in batches(4):
        expected = training_step(plain, reference, batch)
        assert torch.equal(compiled(model, optimizer, batch), expected)
        assert_state(model, state_of(plain))
        for stepper in (reference, optimizer):
            stepper.zero_grad()
    # The model is the one graph, the step is in none.
    assert counters["stats"]["unique_graphs"] == 1
    assert any("SparseOptimizer._step" in reason for reason in counters["graph_break"])


@pytest.mark.parametrize("make", [ff.SGD, torch.optim.SGD])
def test_a_weight_written_before_a_compiled_step_stays(make: Any) -> None:
    model = nn.Linear(8, 4)
    tuned = ff.train_only(model, ff.random_mask(model, density=0.5, seed=0))
    optimizer = make(list(tuned.parameters()), lr=0.0)
    compiled = torch.compile(training_step, backend="aot_eager")
    batch = torch.ones(2, 8)
    for _ in range(2):
        compiled(model, optimizer, batch)
    weight = model._parameters["weight"]
    with torch.no_grad():
        weight.mul_(2.0)
    written = weight.detach().clone()
    compiled(model, optimizer, batch)  # lr = 0: nothing may move
    assert torch.equal(weight, written)
    tuned.release()
    if make is torch.optim.SGD:
        with pytest.raises(RuntimeError, match="does not train any more"):
            compiled(model, optimizer, batch)


def test_a_compiled_step_of_another_model_has_no_break_of_ours(counters: Any) -> None:
    tuned = ff.train_only(one := nn.Linear(4, 4), ff.random_mask(one, k=3, seed=0))
    other = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 4)).sum().backward()
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert not any("fishfast" in reason for reason in counters["graph_break"])
    assert tuned.num_selected == 3


def test_compiled_training_step_with_an_attached_optimizer() -> None:
    def attached(tuned: ff.SparseTuning) -> torch.optim.Optimizer:
        optimizer = torch.optim.RMSprop(tuned.parameters(), lr=0.05)
        tuned.attach(optimizer)
        return optimizer

    (plain, reference), (model, optimizer) = two_runs(attached)
    compiled = torch.compile(training_step, backend="aot_eager")
    for batch in batches(2):
        training_step(plain, reference, batch)
        compiled(model, optimizer, batch)
        assert_masters_match(model)
    # torch's own step is traced and rounds otherwise.
    torch.testing.assert_close(state_of(model), state_of(plain))
