"""The torch.optim contract that ff.AdamW and ff.SGD share, around the compact parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import (
    TORCH_HAS_FMA,
    CorrectSqrt,
    gradients_over_time,
    mask_of,
    random_tensors,
    same_bits,
    set_gradients,
    some_indices,
    steps_of_ours,
    tune,
)
from torch import Tensor, nn

import fishfast as ff

Make = Callable[..., torch.optim.Optimizer]


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return ff.AdamW(parameters, **{"lr": 0.05, **options})


def sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return ff.SGD(parameters, **{"lr": 0.05, "momentum": 0.9, **options})


MAKERS = pytest.mark.parametrize("make", [adamw, sgd], ids=["AdamW", "SGD"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch"])


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def half_mask(model: nn.Module, seed: int = 0) -> ff.SparseMask:
    return ff.random_mask(model, density=0.5, seed=seed)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(state[name], tensor), name


# --- determinism and what is left alone ---


@pytest.mark.skipif(not TORCH_HAS_FMA, reason="torch has no fused multiply-add here")
@MAKERS
def test_backends_agree_bit_for_bit(make: Make) -> None:
    weights = random_tensors((301, 7), (4, 3, 2, 2))
    indices = [some_indices(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=5)
    compiled, plain = tune(weights, indices), tune(weights, indices)
    with CorrectSqrt():
        ours = steps_of_ours(compiled, make(compiled.parameters(), backend="cpu"), series)
        theirs = steps_of_ours(plain, make(plain.parameters(), backend="torch"), series)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(same_bits(mine[key], other[key]) for key in mine)


@MAKERS
def test_threads_do_not_change_the_bits(make: Make) -> None:
    # 20 pieces of csrc/cpu_step.h: enough that five threads are really started.
    weights = random_tensors(17 * 16384 + 5, 3 * 16384)
    indices = [torch.arange(w.numel()) for w in weights]
    series = gradients_over_time(weights, steps=2)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tuned = tune(weights, indices)
            optimizer = make(tuned.parameters(), backend="cpu")
            results.append(steps_of_ours(tuned, optimizer, series)[-1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(results[0][key], other[key]) for key in results[0])


@MAKERS
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untouched_weights_stay_bit_identical(
    make: Make, backend: str, dtype: torch.dtype, tmp_path: Any
) -> None:
    weight = torch.randn(40, 9).to(dtype)
    # Values that any arithmetic would change: NaN with a payload, -0.0, subnormal, infinite.
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    special = torch.tensor([-1, -2, 1, 3], dtype=bits).view(dtype)
    weight.view(-1)[:6] = torch.cat([special, torch.tensor([-0.0, torch.inf]).to(dtype)])
    found = torch.arange(10, 360, 3)
    outside = torch.ones(360, dtype=torch.bool).index_fill(0, found, False)

    def assert_untouched(model: nn.Module) -> None:
        assert same_bits(model.state_dict()["w0"].view(-1)[outside], weight.view(-1)[outside])

    tuned = tune([weight], [found])
    # Hashing and saving refuse no NaN outside the mask: it is the base's own.
    optimizer = make(tuned.parameters(), weight_decay=0.3, backend=backend)
    for round_ in range(3):
        steps_of_ours(tuned, optimizer, gradients_over_time([weight], steps=10, seed=round_))
        assert_untouched(tuned.model)
        tuned.model.load_state_dict(tuned.model.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        ff.save_delta(tuned, tmp_path / "delta.safetensors")
        assert_untouched(tuned.model)
    trained = tuned.model.state_dict()["w0"].clone()
    assert not same_bits(trained.view(-1)[found], weight.view(-1)[found])
    other = tune([weight], [found]).release()
    delta = ff.load_delta(tmp_path / "delta.safetensors")
    for _ in range(3):
        delta.apply_(other)
        assert_untouched(other)
        delta.revert_(other)
        assert same_bits(other.state_dict()["w0"], weight)


@MAKERS
@BACKENDS
def test_mask_whose_indices_are_strided(make: Make, backend: str) -> None:
    weights = random_tensors((20, 5))
    all_indices = torch.arange(100)
    strided, plain = tune(weights, [all_indices[::3]]), tune(weights, [all_indices[::3].clone()])
    series = gradients_over_time(weights, steps=3)
    steps_of_ours(strided, make(strided.parameters(), backend=backend), series)
    steps_of_ours(plain, make(plain.parameters(), backend=backend), series)
    assert_same_weights(strided.model, weights_of(plain.model))


@MAKERS
@BACKENDS
def test_weight_decay_touches_masked_entries_only(make: Make, backend: str) -> None:
    weights = random_tensors((20, 5))
    found = some_indices(100)
    tuned = tune(weights, [found])
    optimizer = make(tuned.parameters(), weight_decay=0.5, backend=backend)
    steps_of_ours(tuned, optimizer, [[torch.zeros(20, 5)]] * 20)
    after, before = tuned.model.w0.detach().flatten(), weights[0].flatten()
    outside = torch.ones(100, dtype=torch.bool).index_fill(0, found.long(), False)
    assert same_bits(after[outside], before[outside])
    assert (after[found.long()].abs() < before[found.long()].abs()).all()


@pytest.mark.large
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_weight_of_more_than_2_to_the_31_elements(backend: str, tmp_path: Any) -> None:
    numel = 2**31 + 11
    found = torch.tensor([0, 5, 2**31 - 1, 2**31, numel - 1])
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16), requires_grad=False)
    tuned = ff.train_only(model, mask_of(model, {"weight": found}))
    assert tuned.mask["weight"].dtype == torch.int64
    (values,) = tuned.parameters()
    values.grad = -torch.arange(1.0, 6.0)
    ff.SGD(tuned.parameters(), lr=1.0, backend=backend).step()
    ff.save_delta(tuned, tmp_path / "delta")
    weight = tuned.release().weight.detach()
    assert torch.equal(weight[found].float(), torch.arange(1.0, 6.0))
    assert sum(int(part.count_nonzero()) for part in weight.split(2**28)) == 5
    weight.zero_()
    ff.load_delta(tmp_path / "delta").apply_(model)
    assert torch.equal(weight[found].float(), torch.arange(1.0, 6.0))


# --- the road through a real model ---


@MAKERS
@BACKENDS
def test_training_a_model_equals_dense_training_with_masked_gradients(
    make: Make, backend: str
) -> None:
    dense, model = small_net(), small_net()
    mask = half_mask(model)
    tuned = ff.train_only(model, mask)
    optimizer = make(tuned.parameters(), backend=backend)
    # The same step by hand over the whole model: ours, on a full mask of plain parameters.
    reference = make(dense.parameters(), backend=backend)
    for seed in range(5):
        batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        for net, stepper in ((dense, reference), (model, optimizer)):
            stepper.zero_grad()
            net(batch).square().mean().backward()
        for name, parameter in dense.named_parameters():
            keep = torch.zeros(parameter.numel()).index_fill(0, mask[name].long(), 1.0)
            parameter.grad *= keep.view(parameter.shape)
        reference.step()
        optimizer.step()
        assert_same_weights(model, weights_of(dense))


@MAKERS
def test_clip_grad_norm(make: Make) -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    model(torch.randn(5, 6)).square().sum().backward()
    gradients = [p.grad.clone() for p in tuned.parameters()]
    total = torch.cat(gradients).norm()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm, total)
    clipped = torch.cat([p.grad for p in tuned.parameters()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.1))
    by_hand = small_net()
    expected = ff.train_only(by_hand, half_mask(by_hand))
    for parameter, values in zip(expected.parameters(), tuned.parameters(), strict=True):
        parameter.grad = values.grad.clone()
    make(tuned.parameters()).step()
    make(expected.parameters()).step()
    assert_same_weights(model, weights_of(by_hand))


def test_clip_grad_value() -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    model(torch.randn(5, 6)).square().sum().backward()
    expected = [p.grad.clamp(-0.2, 0.2) for p in tuned.parameters()]
    assert any((p.grad.abs() > 0.2).any() for p in tuned.parameters())
    nn.utils.clip_grad_value_(model.parameters(), 0.2)
    for parameter, clamped in zip(tuned.parameters(), expected, strict=True):
        assert same_bits(parameter.grad, clamped)


@MAKERS
def test_gradient_accumulation_equals_one_batch(make: Make) -> None:
    # Small integers: sums are exact, so that the order of the additions does not show.
    def integer_model() -> nn.Module:
        model = nn.Linear(6, 4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((torch.arange(parameter.numel()) % 5 - 2).view_as(parameter))
        return model

    data = torch.randint(-3, 4, (12, 6)).float()
    whole, parts = integer_model(), integer_model()
    results = []
    for model, chunks in ((whole, [data]), (parts, data.split([5, 4, 3]))):
        tuned = ff.train_only(model, half_mask(model))
        for part in chunks:
            model(part).square().sum().backward()
        make(tuned.parameters()).step()
        results.append([p.grad for p in tuned.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert_same_weights(whole, weights_of(parts))


@MAKERS
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    ],
    ids=["StepLR", "CosineAnnealingLR", "OneCycleLR"],
)
def test_lr_schedulers(make: Make, schedule: Callable[[Any], Any]) -> None:
    weights = random_tensors((9, 5))
    found = some_indices(45)
    series = gradients_over_time(weights, steps=5)
    scheduled, by_hand = tune(weights, [found]), tune(weights, [found])
    optimizer, other = make(scheduled.parameters()), make(by_hand.parameters())
    scheduler = schedule(optimizer)
    rates = []
    for gradients in series:
        rates.append(optimizer.param_groups[0]["lr"])
        for key in ("lr", "betas", "momentum"):
            if key in other.param_groups[0]:
                other.param_groups[0][key] = optimizer.param_groups[0][key]
        steps_of_ours(scheduled, optimizer, [gradients])
        steps_of_ours(by_hand, other, [gradients])
        scheduler.step()
    assert len(set(rates)) > 1
    assert_same_weights(scheduled.model, weights_of(by_hand.model))


# --- GradScaler ---


@MAKERS
@BACKENDS
def test_grad_scaler_skips_the_whole_step_on_overflow(make: Make, backend: str) -> None:
    weights = random_tensors((9, 5), (7,))
    tuned = tune(weights, [some_indices(45), torch.arange(7)])
    optimizer = make(tuned.parameters(), weight_decay=0.1, backend=backend)
    steps_of_ours(tuned, optimizer, gradients_over_time(weights, steps=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes the scale, as scaling a loss does
    before = weights_of(tuned.model)
    masters = [p.detach().clone() for p in tuned.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    bad = torch.zeros(45)
    bad[tuned.mask["w0"][0]] = torch.inf
    set_gradients(tuned, [bad.view(9, 5), torch.ones(7)])  # w1 has good ones: it waits too
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same_weights(tuned.model, before)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))
    after = optimizer.state_dict()["state"]
    for index, entry in state.items():
        assert entry.keys() == after[index].keys()
        assert all(same_bits(after[index][key], value) for key, value in entry.items())


@MAKERS
@BACKENDS
def test_grad_scaler_steps_equal_unscaled_ones(make: Make, backend: str) -> None:
    weights = random_tensors((9, 5), (7,))
    indices = [some_indices(45), torch.arange(7)]
    scaled, plain = tune(weights, indices), tune(weights, indices)
    optimizer = make(scaled.parameters(), backend=backend)
    reference = make(plain.parameters(), backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for gradients in gradients_over_time(weights, steps=6):
        scale = float(scaler.scale(torch.ones(())))
        set_gradients(scaled, [g * scale for g in gradients])
        scaler.step(optimizer)
        scaler.update()
        steps_of_ours(plain, reference, [gradients])
        assert_same_weights(scaled.model, weights_of(plain.model))
    assert scaler.get_scale() > 1024.0


@MAKERS
def test_grad_scaler_unscale_then_clip(make: Make) -> None:
    weights = random_tensors((9, 5))
    indices = [some_indices(45)]
    scaled, plain = tune(weights, indices), tune(weights, indices)
    (gradients,) = gradients_over_time(weights, steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = make(scaled.parameters())
    set_gradients(scaled, [g * float(scaler.scale(torch.ones(()))) for g in gradients])
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
    scaler.step(optimizer)
    set_gradients(plain, gradients)
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    make(plain.parameters()).step()
    assert_same_weights(scaled.model, weights_of(plain.model))


def test_overflow_of_an_unmasked_weight_is_no_overflow() -> None:
    tuned = tune(random_tensors(6), [torch.tensor([1, 4])])
    optimizer = ff.SGD(tuned.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    set_gradients(tuned, [torch.tensor([torch.inf, 2.0, torch.nan, torch.inf, 4.0, torch.inf])])
    before = tuned.model.w0.detach().clone()
    scaler.step(optimizer)
    assert same_bits(tuned.model.w0.detach()[[1, 4]], before[[1, 4]] - torch.tensor([1.0, 2.0]))


# --- the rest of the torch.optim contract ---


@MAKERS
def test_closure_runs_with_gradients_and_returns_the_loss(make: Make) -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    optimizer = make(tuned.parameters())
    data = torch.randn(4, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(data).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


@MAKERS
def test_step_hooks_run(make: Make) -> None:
    weights = random_tensors(5)
    tuned = tune(weights, [torch.arange(5)])
    optimizer = make(tuned.parameters())
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", tuned.model.w0[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("post", tuned.model.w0[0].item())))
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    assert [name for name, _ in seen] == ["pre", "post"]
    assert seen[0][1] == weights[0][0].item() != seen[1][1]


@MAKERS
@BACKENDS
def test_add_param_group_with_a_plain_parameter(make: Make, backend: str) -> None:
    weights = random_tensors((4, 4))
    tuned = tune(weights, [some_indices(16)])
    plain, expected = (nn.Parameter(torch.ones(7)) for _ in range(2))
    optimizer = make(tuned.parameters(), backend=backend)
    optimizer.add_param_group({"params": [plain], "lr": 0.5})
    dense = tune([torch.ones(7)], [torch.arange(7)])
    reference = make(dense.parameters(), lr=0.5, backend=backend)
    for seed in range(3):
        plain.grad = torch.randn(7, generator=torch.Generator().manual_seed(seed))
        steps_of_ours(dense, reference, [[plain.grad]])
        set_gradients(tuned, [torch.ones(4, 4)])
        optimizer.step()
    assert same_bits(plain, dense.model.w0)
    assert not torch.equal(plain, expected)


@MAKERS
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make: Make, set_to_none: bool) -> None:
    weights = random_tensors(5)
    tuned = tune(weights, [torch.arange(5)])
    optimizer = make(tuned.parameters())
    set_gradients(tuned, [torch.ones(5)])
    optimizer.zero_grad(set_to_none=set_to_none)
    (values,) = tuned.parameters()
    if set_to_none:
        assert values.grad is None
    else:
        assert torch.equal(values.grad, torch.zeros(5))
    optimizer.step()
    assert ("momentum_buffer" in optimizer.state[values] or "step" in optimizer.state[values]) is (
        not set_to_none
    )
    assert same_bits(tuned.model.w0, weights[0])


@MAKERS
def test_empty_and_frozen_plain_parameters(make: Make) -> None:
    empty, frozen = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.ones(3).bfloat16(), False)
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make([empty, frozen, *tuned.parameters()])
    empty.grad = torch.empty(0, 4)
    set_gradients(tuned, [torch.ones(5)])
    before = tuned.model.w0.detach().clone()
    optimizer.step()
    assert not torch.equal(tuned.model.w0, before)


@MAKERS
def test_gradient_that_is_not_contiguous(make: Make) -> None:
    strided, plain = (tune(random_tensors(12), [torch.arange(6)]) for _ in range(2))
    grad = torch.randn(12)
    next(strided.parameters()).grad = grad[::2]
    next(plain.parameters()).grad = grad[::2].clone()
    make(strided.parameters()).step()
    make(plain.parameters()).step()
    assert_same_weights(strided.model, weights_of(plain.model))


@MAKERS
def test_loaded_state_that_is_strided(make: Make) -> None:
    # torch gives state the strides of its parameter, here those of a channels_last convolution.
    straight, resumed = (nn.Parameter(torch.zeros(4, 3, 2, 2)) for _ in range(2))
    grad = torch.randn(4, 3, 2, 2)
    optimizer = make([straight])
    straight.grad = grad
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for name, value in state["state"][0].items():
        if value.dim():
            state["state"][0][name] = value.to(memory_format=torch.channels_last)
    with torch.no_grad():
        resumed.copy_(straight)
    other = make([resumed])
    other.load_state_dict(state)
    for parameter, stepper in ((straight, optimizer), (resumed, other)):
        parameter.grad = grad
        stepper.step()
    assert same_bits(straight, resumed)


@MAKERS
@BACKENDS
def test_autograd_notices_a_stale_weight(make: Make, backend: str) -> None:
    model = small_net()
    tuned = ff.train_only(model, half_mask(model))
    optimizer = make(tuned.parameters(), backend=backend)
    loss = model(torch.randn(4, 6)).square().sum()
    loss.backward(retain_graph=True)
    weight = model[2]._parameters["weight"]
    before = weight._version, next(tuned.parameters())._version
    optimizer.step()
    assert weight._version > before[0]
    assert next(tuned.parameters())._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- copies of the optimizer ---


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved_by_torch(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@MAKERS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
def test_copy_of_tuning_and_optimizer_trains_on_alone(
    make: Make, copied: Callable[[Any], Any]
) -> None:
    weights = random_tensors((9, 5), (7,))
    indices = [some_indices(45), torch.arange(7)]
    series = gradients_over_time(weights, steps=5)
    straight, original = tune(weights, indices), tune(weights, indices)
    steps_of_ours(straight, make(straight.parameters(), backend="torch"), series)
    optimizer = make(original.parameters(), backend="torch")
    steps_of_ours(original, optimizer, series[:2])
    before = weights_of(original.model)
    other, its_optimizer = copied((original, optimizer))
    steps_of_ours(other, its_optimizer, series[2:])
    assert_same_weights(other.model, weights_of(straight.model))
    assert_same_weights(original.model, before)


@MAKERS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
def test_copy_of_the_optimizer_alone_steps(make: Make, copied: Callable[[Any], Any]) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make(tuned.parameters())
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    before = weights_of(tuned.model)
    other = copied(optimizer)
    (values,) = other.param_groups[0]["params"]
    values.grad = torch.ones(5)
    other.step()
    # Its compact parameter brought its module along, and that one was trained.
    assert same_bits(values.target.weight(), values)
    assert not torch.equal(values.target.weight(), tuned.model.w0)
    assert_same_weights(tuned.model, before)


# --- refusals; a refused step changes nothing ---


def assert_step_refused(
    optimizer: torch.optim.Optimizer, tuned: ff.SparseTuning, message: str
) -> None:
    before = weights_of(tuned.model)
    masters = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same_weights(tuned.model, before)
    assert all(same_bits(p, m) for p, m in zip(tuned.parameters(), masters, strict=True))
    assert not any(optimizer.state.values())


@MAKERS
def test_sparse_gradient_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    first, second = tuned.parameters()
    first.grad, second.grad = torch.ones(5), torch.ones(5).to_sparse()
    assert_step_refused(
        make(tuned.parameters()), tuned, "gradients must be dense float32; got .*sparse_coo"
    )


@MAKERS
def test_model_moved_to_double_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5, 5), [torch.arange(5)] * 2)
    set_gradients(tuned, [torch.ones(5)] * 2)
    tuned.model.double()
    assert_step_refused(
        make(tuned.parameters()), tuned, r"the model was moved to torch.float64 after train_only"
    )


@MAKERS
def test_state_on_another_device_is_refused(make: Make) -> None:
    weights = random_tensors(5)
    tuned = tune(weights, [torch.arange(5)])
    optimizer = make(tuned.parameters())
    steps_of_ours(tuned, optimizer, [[torch.ones(5)]])
    before = weights_of(tuned.model)
    for state in optimizer.state.values():
        state.update({name: value.to("meta") for name, value in state.items() if value.dim()})
    set_gradients(tuned, [torch.ones(5)])
    with pytest.raises(RuntimeError, match="state must be where its parameter is; got .* on meta"):
        optimizer.step()
    assert_same_weights(tuned.model, before)


@MAKERS
def test_plain_parameter_moved_to_another_layout_is_refused(make: Make) -> None:
    # Its gradient would be read in another order than its values are stored in.
    tuned = tune(random_tensors(5), [torch.arange(5)])
    conv = nn.Conv2d(3, 4, 3)
    optimizer = make([*tuned.parameters(), *conv.parameters()])
    conv.to(memory_format=torch.channels_last)
    conv.weight.grad = torch.ones_like(conv.weight)
    set_gradients(tuned, [torch.ones(5)])
    assert_step_refused(optimizer, tuned, r"parameters must be contiguous; got .*\(4, 3, 3, 3\)")


@MAKERS
@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.ones(4, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(4, dtype=torch.float64)),
        nn.Parameter(torch.ones(4, 4).t()[:2]),
    ],
    ids=["bfloat16", "float64", "not contiguous"],
)
def test_parameters_that_are_refused(make: Make, parameter: nn.Parameter) -> None:
    message = "params must be compact parameters or contiguous float32 ones; got torch"
    with pytest.raises(ValueError, match=message):
        make([parameter])
    tuned = tune(random_tensors(5), [torch.arange(5)])
    optimizer = make(tuned.parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter]})
    assert len(optimizer.param_groups) == 1


@MAKERS
def test_unknown_backend_is_refused(make: Make) -> None:
    tuned = tune(random_tensors(5), [torch.arange(5)])
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*; got 'mps'"):
        make(tuned.parameters(), backend="mps")


@MAKERS
def test_no_parameters_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


def test_masks_of_two_models_in_one_optimizer() -> None:
    first, second = (tune(random_tensors(5), [torch.arange(5)]) for _ in range(2))
    optimizer = ff.SGD([*first.parameters(), *second.parameters()], lr=1.0)
    set_gradients(first, [torch.ones(5)])
    set_gradients(second, [2 * torch.ones(5)])
    optimizer.step()
    assert mask_of(first.model, {}).num_selected == 0
    assert not torch.equal(first.model.w0, second.model.w0)
