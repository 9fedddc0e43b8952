"""Whoever writes masters or weights, what users do to a tuned model ends as on a dense one."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import enter_group, finish, leave_group
from processes import start as start_processes
from stepping import mask_of, same_bits, state_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import LambdaLR
from train_only_net import assert_masters_match

import fishfast as ff


def start(dtype: torch.dtype = torch.float32, seed: int = 0) -> ff.SparseTuning:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    return ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))


def train(tuned: ff.SparseTuning, optimizer: Any, steps: int = 3, first: int = 0) -> None:
    dtype = tuned.model[0].bias.dtype
    for seed in range(first, first + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        tuned.model(x).float().square().mean().backward()
        optimizer.step()


def masters(tuned: ff.SparseTuning) -> Tensor:
    return torch.cat([p.detach() for p in tuned.parameters()])


# --- any optimizer, without attach ---


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(list(parameters), lr=0.1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_weights_follow_any_optimizer(make: Any, density: float) -> None:
    """All weights masked, torch's own optimizer on the dense model is the oracle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    tuned = ff.train_only(model, ff.random_mask(model, density=density, seed=0))
    optimizer, reference = make(tuned.parameters()), make(plain.parameters())
    before = state_of(model)
    train(tuned, optimizer)
    assert_masters_match(model)
    for seed in range(3 if density == 1.0 else 0):
        reference.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        plain(x).square().mean().backward()
        reference.step()
    for name, now in state_of(model).items():
        if density == 1.0:
            torch.testing.assert_close(now, plain.state_dict()[name])
        outside = torch.ones(now.numel(), dtype=torch.bool)
        outside[tuned.mask[name].long()] = False
        assert same_bits(now.flatten()[outside], before[name].flatten()[outside])
        assert not same_bits(now, before[name])


def test_lbfgs_evaluates_the_model_at_each_of_its_points() -> None:
    tuned = start()
    plain = copy.deepcopy(tuned.model)
    for name, parameter in plain.named_parameters():
        assert name.endswith("_values") is parameter.requires_grad
    optimizer = lbfgs(tuned.parameters())
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tuned.model(x).square().mean()
        loss.backward()
        seen.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(seen) > 5
    assert seen[-1] < 0.5 * seen[0]
    assert_masters_match(tuned.model)
    assert tuned.model(x).square().mean().item() <= seen[-1] * 1.5


class Breaks(torch.optim.Optimizer):
    """Changes the first parameter without counting a version, then raises."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        first = self.param_groups[0]["params"][0]
        first.detach().numpy()[:] += 1
        raise ArithmeticError("half-way")


def test_a_step_that_raises_leaves_no_two_truths() -> None:
    tuned = start()
    with pytest.raises(ArithmeticError):
        Breaks(tuned.parameters()).step()
    tuned.model(torch.ones(1, 8))
    assert_masters_match(tuned.model)


def test_other_optimizers_write_nothing_between_forward_and_backward() -> None:
    """As in a GAN: the other net's step must not touch the weights of this one."""
    tuned, other = start(), nn.Linear(4, 1)
    stepper = torch.optim.AdamW(other.parameters(), lr=0.1)
    y = tuned.model(torch.ones(2, 8))
    other(y.detach()).sum().backward()
    versions = [p.target.weight()._version for p in tuned.parameters()]
    stepper.step()
    assert versions == [p.target.weight()._version for p in tuned.parameters()]
    y.sum().backward()


def test_a_wrapping_optimizer_is_attached_through_its_wrapper() -> None:
    class Lookahead:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.optimizer = inner

    tuned = start(torch.bfloat16)
    inner = torch.optim.AdamW(tuned.parameters(), lr=1e-4)
    tuned.attach(Lookahead(inner))
    train(tuned, inner)
    assert "master" in inner.state_dict()["state"][0]


class LoadsItself(torch.optim.AdamW):
    """An optimizer with a ``load_state_dict`` of its own, that calls no hooks."""

    def load_state_dict(self, state_dict: Any) -> None:
        state = copy.deepcopy(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, entries in state["state"].items():
            self.state[parameters[index]] = entries


def test_masters_are_taken_after_a_load_that_calls_no_hooks() -> None:
    (one, optimizer), (two, other) = (
        (tuned, LoadsItself(tuned.parameters(), lr=1e-4))
        for tuned in (start(torch.bfloat16), start(torch.bfloat16))
    )
    one.attach(optimizer), two.attach(other)
    train(one, optimizer)
    two.model.load_state_dict(one.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert same_bits(masters(one), masters(two))


# --- loads ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("again", ["state of the optimizer", "new optimizer"])
def test_the_initial_state_loaded_again_is_a_fresh_start(dtype: torch.dtype, again: str) -> None:
    """After a search for the learning rate, a fold, a warm-up."""
    tuned = start(dtype)
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-3)
    initial = copy.deepcopy((tuned.model.state_dict(), optimizer.state_dict()))
    train(tuned, optimizer, steps=5)
    tuned.model.load_state_dict(initial[0])
    if again == "new optimizer":
        optimizer = ff.AdamW(tuned.parameters(), lr=1e-3)
    else:
        optimizer.load_state_dict(initial[1])
    fresh = start(dtype)
    assert same_bits(masters(tuned), masters(fresh))
    train(tuned, optimizer, steps=9)
    train(fresh, ff.AdamW(fresh.parameters(), lr=1e-3), steps=9)
    assert same_bits(masters(tuned), masters(fresh))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_resumed_run_is_one_that_never_stopped(order: str) -> None:
    tuned, resumed = start(torch.bfloat16), start(torch.bfloat16, seed=1)
    optimizer, other = (ff.AdamW(t.parameters(), lr=1e-4) for t in (tuned, resumed))
    train(tuned, optimizer)
    saved = copy.deepcopy((tuned.model.state_dict(), optimizer.state_dict()))
    loads = [
        lambda: resumed.model.load_state_dict(saved[0]),
        lambda: other.load_state_dict(saved[1]),
    ]
    for load in loads if order == "model first" else loads[::-1]:
        load()
    assert same_bits(masters(tuned), masters(resumed))
    for run, stepper in ((tuned, optimizer), (resumed, other)):
        train(run, stepper, first=3)
    assert same_bits(masters(tuned), masters(resumed))


def tied() -> ff.SparseTuning:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    return ff.train_only(model, ff.random_mask(model, density=0.5, seed=0))


@pytest.mark.parametrize("order", [1, -1], ids=["model first", "optimizer first"])
def test_a_tied_weight_resumes_exactly(order: int) -> None:
    """Its checkpoint has it under two names, so it is loaded twice."""
    tuned, resumed = tied(), tied()
    optimizer, other = (ff.AdamW(t.parameters(), lr=1e-3) for t in (tuned, resumed))
    for _ in range(3):
        tuned.model(torch.arange(8)).float().square().mean().backward()
        optimizer.step()
    saved = copy.deepcopy((tuned.model.state_dict(), optimizer.state_dict()))
    loads = [resumed.model.load_state_dict, other.load_state_dict]
    for load, state in list(zip(loads, saved, strict=True))[::order]:
        load(state)
    assert not same_bits(masters(tuned), masters(tuned).bfloat16().float())
    assert same_bits(masters(tuned), masters(resumed))


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "copy_": lambda p, new: p.copy_(new),
    "data": lambda p, new: setattr(p, "data", new.clone()),
    "set_": lambda p, new: p.set_(new.clone()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("make", [ff.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("then", ["load", "attach", "copy", "pickle"])
def test_written_values_outlive_loads_and_copies(write: Any, make: Any, then: str) -> None:
    tuned = start(torch.bfloat16)
    optimizer = make(tuned.parameters(), lr=1e-3)
    tuned.attach(optimizer)
    train(tuned, optimizer)
    new = [torch.randn(len(p)) for p in tuned.parameters()]
    with torch.no_grad():
        for parameter, numbers in zip(tuned.parameters(), new, strict=True):
            write(parameter, numbers)
    if then == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    elif then == "attach":
        tuned.attach(optimizer)
    else:
        if then == "copy":
            tuned, optimizer = copy.deepcopy((tuned, optimizer))
        else:
            tuned, optimizer = pickle.loads(pickle.dumps((tuned, optimizer)))
        tuned.attach(optimizer)
    assert same_bits(masters(tuned), torch.cat(new))
    tuned.model.state_dict()  # reads
    assert_masters_match(tuned.model)


def test_a_write_to_a_copied_weight_is_taken_at_the_next_read() -> None:
    tuned = copy.deepcopy(start())
    with torch.no_grad():
        tuned.model[0].weight.fill_(0.5)
    tuned.model(torch.ones(1, 8))
    assert next(tuned.parameters()).eq(0.5).all()


def test_rebase_takes_what_no_version_counts() -> None:
    tuned = start()
    tuned.model[0]._parameters["weight"].detach().numpy()[:] = 0.25  # as a collective writes
    tuned.rebase()
    assert next(tuned.parameters()).eq(0.25).all()
    assert_masters_match(tuned.model)


DCP_OPTIMIZERS: dict[str, Callable[[ff.SparseTuning], torch.optim.Optimizer]] = {
    "ff.AdamW": lambda t: ff.AdamW(t.parameters(), lr=1e-4),
    "ff.SGD": lambda t: ff.SGD(t.parameters(), lr=1e-3),
    "AdamW": lambda t: torch.optim.AdamW(t.parameters(), lr=1e-4),
    "SGD": lambda t: torch.optim.SGD(t.parameters(), lr=1e-3),
}


@pytest.mark.parametrize("make", DCP_OPTIMIZERS.values(), ids=DCP_OPTIMIZERS.keys())
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_a_distributed_checkpoint_resumes_exactly(make: Any, flat: bool, tmp_path: Any) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    runs = [start(torch.bfloat16), start(torch.bfloat16, seed=1)]
    steppers = [make(tuned) for tuned in runs]
    for tuned, optimizer in zip(runs, steppers, strict=True):
        if not isinstance(optimizer, (ff.AdamW, ff.SGD)):
            tuned.attach(optimizer)
    train(runs[0], steppers[0])
    model, state = get_state_dict(runs[0].model, steppers[0], options=options)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    model, state = get_state_dict(runs[1].model, steppers[1], options=options)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        runs[1].model, steppers[1], model_state_dict=model, optim_state_dict=state, options=options
    )
    assert same_bits(masters(runs[0]), masters(runs[1]))
    for tuned, optimizer in zip(runs, steppers, strict=True):
        train(tuned, optimizer, first=3)
    assert same_bits(masters(runs[0]), masters(runs[1]))


def test_what_requires_grad_is_saved_and_loaded_alone(tmp_path: Any) -> None:
    tuned, other = start(torch.bfloat16), start(torch.bfloat16)
    train(tuned, ff.AdamW(tuned.parameters(), lr=0.01))
    trained = {n: p for n, p in tuned.model.named_parameters() if p.requires_grad}
    torch.save(trained, tmp_path / "trained.pt")
    assert os.path.getsize(tmp_path / "trained.pt") < 4 * tuned.num_selected + 4000
    loaded = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert all(type(tensor) is nn.Parameter for tensor in loaded.values())
    keys = other.model.load_state_dict(loaded, strict=False)
    assert not keys.unexpected_keys
    assert same_bits(masters(tuned), masters(other))
    assert all(map(same_bits, other.model.state_dict().values(), tuned.model.state_dict().values()))
    wrong = {n: p[:-1] for n, p in loaded.items()}
    with pytest.raises(RuntimeError, match="size mismatch for .*saved with another mask"):
        other.model.load_state_dict(wrong, strict=False)


# --- several processes ---


def _worker(rank: int, size: int, folder: str, function: Callable[[int, int], list[bool]]) -> None:
    enter_group(rank, size, folder)
    torch.save(function(rank, size), f"{folder}/{rank}")
    leave_group()


def run_processes(
    function: Callable[[int, int], list[bool]], size: int, folder: Any
) -> list[list[bool]]:
    """Return what a function returns in each of some processes."""
    finish(start_processes(_worker, size, size, str(folder), function))
    return [torch.load(folder / str(rank)) for rank in range(size)]


def _ranks(rank: int, size: int) -> list[bool]:
    found: list[bool] = []

    def equal_everywhere(tensor: Tensor) -> bool:
        every = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(every, tensor.contiguous())
        return all(same_bits(every[0], other) for other in every)

    for make in ("zero", "plain"):
        tuned = start()
        net = DistributedDataParallel(tuned.model)
        if make == "zero":
            held = list(tuned.parameters())
            optimizer: Any = ZeroRedundancyOptimizer(held, optimizer_class=ff.AdamW, lr=0.01)
        else:
            optimizer = ff.AdamW(tuned.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            net(x).square().mean().backward()
            optimizer.step()
        found += [equal_everywhere(t) for t in tuned.model.state_dict().values()]
        assert_masters_match(tuned.model)
    # Values that a collective writes, which counts no version.
    for write in (lambda p: dist.broadcast(p, 0), lambda p: dist.broadcast(p.data, 0)):
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.fill_(rank)
            tuned.model(torch.ones(1, 8))
            for parameter in tuned.parameters():
                write(parameter)
            found.append(equal_everywhere(tuned.model(torch.ones(1, 8))))
        assert_masters_match(tuned.model)
    return found


def test_every_rank_has_the_same_weights(tmp_path: Any) -> None:
    for found in run_processes(_ranks, 2, tmp_path):
        assert len(found) == 10
        assert all(found)


def _wrapped(rank: int, size: int) -> list[bool]:
    found = []
    for reference in ("held", "new"):
        tuned = start()
        held = list(tuned.parameters())
        expected = tuned.model(torch.ones(1, 8)).detach()
        net = DistributedDataParallel(tuned.model)  # its broadcast counts versions, changes no bit
        parameters = held if reference == "held" else list(tuned.parameters())
        vector_to_parameters(parameters_to_vector(parameters) + 1, parameters)
        found.append(not torch.equal(net(torch.ones(1, 8)), expected))
        assert_masters_match(tuned.model)
        values = masters(tuned).clone()
        net(torch.ones(1, 8)).sum().backward()
        ff.SGD(tuned.parameters(), lr=0.0).step()
        found.append(same_bits(masters(tuned), values))
    return found


def test_a_write_right_after_wrapping_counts(tmp_path: Any) -> None:
    assert run_processes(_wrapped, 1, tmp_path) == [[True] * 4]


# --- other ways around a model ---


def test_a_scheduler_and_an_average_of_the_trained_values() -> None:
    tuned = start()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.05, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    average = [p.detach().clone() for p in tuned.parameters()]
    for step in range(3):
        train(tuned, optimizer, steps=1, first=step)
        scheduler.step()
        for a, p in zip(average, tuned.parameters(), strict=True):
            a.lerp_(p.detach(), 0.1)
    with torch.no_grad():
        for a, p in zip(average, tuned.parameters(), strict=True):
            p.copy_(a)
    tuned.model.state_dict()
    assert same_bits(masters(tuned), torch.cat(average))
    assert_masters_match(tuned.model)


def test_an_average_of_the_whole_model_is_refused_with_a_way_back(tmp_path: Any) -> None:
    tuned = start()
    base = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    train(tuned, ff.AdamW(tuned.parameters(), lr=0.01))
    with torch.no_grad():  # as torch.optim.swa_utils' average moves constant weights
        for parameter in tuned.model.parameters():
            parameter.copy_(0.9 * parameter + 0.1 * (parameter + 1e-6))
    kept = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(RuntimeError, match=r"such as '0\.weight'.*load the base checkpoint.*copy"):
        ff.save_delta(tuned, tmp_path / "delta")
    tuned.model.load_state_dict(base)
    with torch.no_grad():
        for parameter, values in zip(tuned.parameters(), kept, strict=True):
            parameter.copy_(values)
    ff.save_delta(tuned, tmp_path / "delta")
    found = ff.load_delta(tmp_path / "delta").values
    names = [name.removesuffix("_values") for name, _ in tuned.named_parameters()]
    assert all(same_bits(found[n], values) for n, values in zip(names, kept, strict=True))


def test_quantization_of_a_tuned_model_is_refused() -> None:
    tuned = start()
    with pytest.raises(RuntimeError, match=r"quantization needs plain modules.*'0\.weight'"):
        torch.ao.quantization.quantize_dynamic(tuned.model.eval(), {nn.Linear}, dtype=torch.qint8)
    plain = copy.deepcopy(tuned).release().eval()
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized[0]) is not nn.Linear


def test_a_resized_weight_is_refused_when_it_is_read() -> None:
    model = nn.Embedding(5, 4)
    tuned = ff.train_only(model, mask_of(model, {"weight": torch.tensor([0, 7])}))
    with torch.no_grad():
        model.weight.data = torch.zeros(8, 4)
    for read in (lambda: model(torch.tensor([1])), lambda: model.weight):
        with pytest.raises(RuntimeError, match=r"had shape \(5, 4\) in train_only and is of shape"):
            read()
    assert tuned.num_selected == 2
