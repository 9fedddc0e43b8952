"""CUDA graphs on a card: a captured step, and a captured training iteration, against plain ones.

test_capturable_simt.py has the arithmetic; here are the streams, the graph and its memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_models import (
    assert_same_states,
    assert_same_weights,
    going_on_from_torch,
    images,
    net,
    tuned_on_both,
)
from torch import Tensor, nn

import fishfast as ff

pytestmark = pytest.mark.gpu

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (ff.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (ff.AdamW, {"amsgrad": True, "betas": (0.9, 0.5)}),
    "Adam": (ff.Adam, {"weight_decay": 0.1, "maximize": True}),
    "SGD": (ff.SGD, {}),
    "momentum": (ff.SGD, {"momentum": 0.9, "dampening": 0.3}),
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Warm up on a side stream, as torch's documentation has it, and capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def net_on_card() -> nn.Module:
    torch.manual_seed(0)
    return net().cuda()


def tuned_net(
    name: str, model: nn.Module, **more: Any
) -> tuple[ff.SparseTuning, torch.optim.Optimizer]:
    make, options = OPTIMIZERS[name]
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    return tuned, make(tuned.parameters(), backend="cuda", **{**options, **more})


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_steps_equal_the_cpu_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """New gradients and learning rates in the captured memory; ten replays."""
    make, options = OPTIMIZERS[name]
    models, tuned = tuned_on_both(dtype)
    rates = {device: torch.tensor(1e-2, device=device) for device in models}
    optimizers = {
        device: make(
            t.parameters(), lr=rates[device], backend=device, capturable=device == "cuda", **options
        )
        for device, t in tuned.items()
    }

    def set_gradients() -> None:
        for on_cpu, on_gpu in zip(*(t.parameters() for t in tuned.values()), strict=True):
            on_cpu.grad = torch.randn_like(on_cpu)
            if on_gpu.grad is None:
                on_gpu.grad = torch.empty_like(on_gpu)
            on_gpu.grad.copy_(on_cpu.grad)

    set_gradients()
    graph = captured(optimizers["cuda"].step)
    for _ in range(3):  # the warm-up; the capture itself ran nothing
        optimizers["cpu"].step()
    for step in range(10):
        for rate in rates.values():
            rate.fill_(1e-2 / (1 + step))
        set_gradients()
        graph.replay()
        optimizers["cpu"].step()
        assert_same_weights(models)
    assert_same_states(optimizers)


@EACH
def test_captured_iteration_equals_an_ordinary_one(name: str) -> None:
    """Forward, backward and step in one graph; gradients live in the graph's own memory."""
    models = [net_on_card(), net_on_card()]
    more = {"lr": 1e-3, **({} if "SGD" in OPTIMIZERS[name][0].__name__ else {"eps": 1e-2})}
    (_, reference) = tuned_net(name, models[0], **more)
    (_, optimizer) = tuned_net(name, models[1], capturable=True, **more)
    static = images(0)

    def iterate(model: nn.Module, stepper: torch.optim.Optimizer, data: Tensor) -> Tensor:
        stepper.zero_grad(set_to_none=True)
        loss = model(data).square().mean()
        loss.backward()
        stepper.step()
        return loss

    graph = captured(lambda: iterate(models[1], optimizer, static))
    for _ in range(3):
        iterate(models[0], reference, static.clone())
    before = copy.deepcopy(models[1].state_dict())
    for seed in range(8):
        static.copy_(images(seed))
        graph.replay()
        iterate(models[0], reference, images(seed))
    # Library calls may choose other algorithms in a capture: their last bits may differ.
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())
    masks = ff.random_mask(net_on_card(), density=0.3, seed=0)
    for key, found in masks.items():
        now, then = models[1].state_dict()[key].flatten(), before[key].flatten()
        outside = torch.ones(now.numel(), dtype=torch.bool, device="cuda")
        outside[found.long().cuda()] = False
        assert torch.equal(now[outside], then[outside])
    head = "6.weight"  # a bias before a norm has next to no gradient
    assert not torch.equal(models[1].state_dict()[head], before[head])


@pytest.mark.parametrize("name", ["AdamW", "momentum"])
def test_overflow_in_a_replay_skips_the_whole_step(name: str) -> None:
    model = net_on_card()
    model.eval()  # BatchNorm's statistics would take the infinity in
    tuned, optimizer = tuned_net(name, model, lr=1e-3, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=1000)
    scaler.scale(torch.ones((), device="cuda"))  # makes the scale outside the capture
    static = images(0)

    def iterate() -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(model(static).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    graph = captured(iterate)
    for overflow in (False, True, False):
        static.copy_(images(1))
        if overflow:
            static[0, 0, 0, 0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
        steps = [int(state["step"]) for state in optimizer.state.values()]
        graph.replay()
        unchanged = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(unchanged) if overflow else not all(unchanged)
        counted = [int(state["step"]) for state in optimizer.state.values()]
        assert counted == [step + (not overflow) for step in steps]
    assert scaler.get_scale() == 4.0
    assert all(p.isfinite().all() for p in tuned.parameters())


@EACH
def test_a_capturable_step_does_not_wait_for_the_card(name: str) -> None:
    model = net_on_card()
    rate = torch.tensor(1e-3, device="cuda")
    _, optimizer = tuned_net(name, model, lr=rate, capturable=True)
    for step in range(3):
        model(images(step)).square().mean().backward()
        if step == 0:  # uploads the tables
            optimizer.step()
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_two_graphs_and_ordinary_steps_share_one_optimizer() -> None:
    models = [net_on_card(), net_on_card()]
    _, reference = tuned_net("momentum", models[0], lr=1e-3)
    tuned, optimizer = tuned_net("momentum", models[1], lr=1e-3, capturable=True)
    sets = [[torch.randn_like(p) for p in tuned.parameters()] for _ in range(3)]

    def step(which: int) -> None:
        for parameter, grad in zip(tuned.parameters(), sets[which], strict=True):
            parameter.grad = grad
        optimizer.step()

    graphs = [captured(lambda which=which: step(which)) for which in (0, 1)]
    order = [0] * 3 + [1] * 3
    for which in (0, 1, 2, 1, 0, 2):
        graphs[which].replay() if which < 2 else step(which)
        order.append(which)
    compact = [p for n, p in models[0].named_parameters() if n.endswith("_values")]
    for which in order:
        for parameter, grad in zip(compact, sets[which], strict=True):
            parameter.grad = grad
        reference.step()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@EACH
def test_capture_without_a_step_before_is_refused(name: str) -> None:
    model = net_on_card()
    tuned, optimizer = tuned_net(name, model, lr=1e-3, capturable=True)
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="take a step like the captured one first"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.step()
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize(
    ("make", "torch_make"), [(ff.AdamW, torch.optim.AdamW), (ff.Adam, torch.optim.Adam)]
)
def test_states_of_torch_capturable_load_both_ways(make: Any, torch_make: Any) -> None:
    """Both go on alike, to rounding: torch takes the bias corrections in fp32."""
    values, reference, ours = going_on_from_torch(
        make, torch_make, {"capturable": True}, capturable=True
    )
    torch.testing.assert_close(values, reference, rtol=1e-5, atol=1e-6)
    assert ours.state[values]["step"].is_cuda
    back = torch_make([reference], capturable=True)
    back.load_state_dict(ours.state_dict())
    assert back.state[reference]["step"].is_cuda
    assert int(back.state[reference]["step"]) == 6
    ordinary = make([values])
    ordinary.load_state_dict(ours.state_dict())
    assert not ordinary.state[values]["step"].is_cuda


@pytest.mark.parametrize("make", [ff.AdamW, ff.SGD])
def test_parameters_that_left_the_card_are_refused(make: Any) -> None:
    model = net_on_card()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    optimizer = make(tuned.parameters(), capturable=True)
    model.cpu()
    model(images(0).cpu()).square().mean().backward()
    with pytest.raises(ValueError, match="capturable must be False for parameters on cpu; got"):
        optimizer.step()


def test_to_the_card_and_back_keeps_masters_and_their_bits() -> None:
    model = net_on_card().cpu().bfloat16()
    tuned = ff.train_only(model, ff.random_mask(model, density=0.3, seed=0))
    optimizer = ff.AdamW(tuned.parameters(), lr=1e-5)
    for where in ("cpu", "cuda", "cpu", "cuda"):
        masters = [p.detach().cpu().clone() for p in tuned.parameters()]
        model.to(where)
        for parameter, master in zip(tuned.parameters(), masters, strict=True):
            assert parameter.dtype == torch.float32
            assert parameter.device.type == parameter.target.weight().device.type == where
            assert torch.equal(parameter.cpu(), master)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = ff.AdamW(tuned.parameters(), lr=1e-5)
        optimizer.load_state_dict(state)
        model(images(0).bfloat16().to(where)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
