"""What a masked training step must do: dense training, the gradient times the mask.

Weights, moments and the mask are dense, fp32 and torch's own.
"""

from __future__ import annotations

import dataclasses

import torch
from fisher_models import Workload
from torch import Tensor, nn
from train_contenders import LEARNING_RATE, Training

import fishfast as ff

__all__ = ["Reference", "check", "check_floor", "train_reference"]

_STEPS = 2  # LoRA's A has no gradient in the first one
# Of the gradients' norm. fp32: sums of thousands of products in another order. bf16: a gradient,
# and what it is computed from, are rounded to 2**-9 each.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7}
_STEP = 0.02  # of a first step's size; rounding in fp32 next to a weight of 1 makes 0.001
_CLEAR = 1e-3  # of the gradients' root mean square; Adam turns rounding in less into whole steps


@dataclasses.dataclass(frozen=True)
class Reference:
    """Two steps of dense training on masked gradients.

    Args:
        mask: which weights train.
        gradients: name -> the selected weights' gradients of the first step.
        first_loss: before the first step.
        loss: after the last.
        weights: name -> the selected weights after the last.
    """

    mask: ff.SparseMask
    gradients: dict[str, Tensor]
    first_loss: float
    loss: float
    weights: dict[str, Tensor]


def train_reference(workload: Workload, mask: ff.SparseMask) -> Reference:
    """Train a model densely in fp32 masters on masked gradients.

    Args:
        workload: its model is trained.
        mask: which weights train.
    """
    weights = dict(workload.model.named_parameters())
    training = Training(workload.model, workload, list(weights.values()), None)
    masters = {name: p.detach().float().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(
        masters.values(), lr=LEARNING_RATE, weight_decay=0.0, foreach=False
    )
    first_loss, gradients = training.evaluate(), {}
    for step in range(_STEPS):
        training.backward()
        if step == 0:
            gradients = {
                name: _selected(weights[name].grad, indices)
                for name, indices in mask.items()
                if len(indices)
            }
        for name, p in weights.items():
            keep = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
            if name in mask:
                keep.view(-1)[mask[name].to(p.device).long()] = True
            masters[name].grad = torch.where(keep, p.grad.float(), 0.0)
        nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in weights.items():
                p.grad = None
                p.copy_(masters[name])
    trained = {name: _selected(weights[name], mask[name]) for name in gradients}
    return Reference(mask, gradients, first_loss, training.evaluate(), trained)


def _selected(values: Tensor, indices: Tensor) -> Tensor:
    return values.detach().reshape(-1)[indices.to(values.device).long()].float()


def check(
    training: Training, weights: dict[str, nn.Parameter],
    reference: Reference | None,
) -> float | None:  # fmt: skip
    """Refuse a training that does not train what it should.

    Args:
        training: has taken no step yet; afterwards it has taken two.
        weights: of the model as it was before the contender changed it.
        reference: of a masked training; None for full fine-tuning, and for adapters, whose base
            must not change.

    Returns:
        The relative error of the gradients, of a masked training.

    Raises:
        AssertionError: gradients, the loss or fp32 weights differ from the reference's, the first
            step has another size, weights that do not train change, or a parameter that does,
            does not.
    """
    before = {name: p.detach().clone() for name, p in weights.items()}
    training.backward()
    error = None
    if reference is not None:
        parameters = training.model.named_parameters()  # type: ignore[attr-defined]
        grads = {name: p.grad for name, p in parameters if p.grad is not None}
        error = _check_gradients(training, grads, reference)
    first = [
        (p, p.detach().clone(), p.grad.detach().clone())
        for p in training.parameters
        if p.grad is not None
    ]
    for p in training.parameters:
        p.grad = None
    training.step()
    off = 0.0 if training.optimizer is None else _first_step_error(first)
    for _ in range(_STEPS - 1):
        training.step()
    free = set() if reference is not None else {id(p) for p in training.parameters}
    for name, p in weights.items():
        changed = (p.detach() != before[name]).flatten()
        if reference is not None and name in reference.mask:
            changed[reference.mask[name].to(p.device).long()] = False
        if id(p) not in free and changed.any():
            raise AssertionError(
                f"it changed {int(changed.sum())} weights of {name!r} that it does not train"
            )
    moving = [bool((p != old).any()) for p, old, grad in first if _will_move(p, grad)]
    if training.optimizer is not None and not all(moving):
        raise AssertionError(f"it does not train {moving.count(False)} of {len(moving)} parameters")
    if not off <= _STEP:
        raise AssertionError(f"its first step is off by {off:.2g} of the learning rate")
    if reference is not None:
        _check_loss(training, reference)
        _check_weights(weights, reference)
    return error


def check_floor(training: Training, weights: dict[str, nn.Parameter], reference: Reference) -> None:
    """Refuse a floor whose step does not compute the gradients of full fine-tuning.

    Args:
        training: has no optimizer; its step is what is timed.
        weights: of its model.
        reference: holds the gradients of some of the weights.

    Raises:
        AssertionError: a gradient differs from the reference's, or there is none.
    """
    grads: dict[str, Tensor] = {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, n=name: grads.update({n: p.grad.clone()}))
        for name, p in weights.items()
        if p.requires_grad
    ]
    training.step()
    for hook in hooks:
        hook.remove()
    missing = weights.keys() - grads.keys()
    assert not missing, f"it computed no gradient of {len(missing)} of {len(weights)} parameters"
    _check_gradients(training, grads, reference)


def _will_move(p: nn.Parameter, grad: Tensor) -> bool:
    """Return whether a step must show: a bf16 weight of 1 is rounded to where it was."""
    return p.dtype == torch.float32 and float(grad.abs().max()) > 1e-6


def _first_step_error(first: list[tuple[nn.Parameter, Tensor, Tensor]]) -> float:
    """Return by what part the first step differs from Adam's, the learning rate whatever the size.

    Of each parameter's largest change, of weights whose clipped gradient is a thousand of Adam's
    epsilons and next to which their dtype's rounding does not hide a hundredth of a step.
    """
    norm = float(torch.stack([grad.float().norm() for _, _, grad in first]).norm())
    errors = []
    for p, old, grad in first:
        tells = grad.abs() > 1e-5 * max(1.0, norm)
        tells &= old.abs() * torch.finfo(p.dtype).eps <= 0.01 * LEARNING_RATE
        if tells.any():
            change = (p.detach()[tells].float() - old[tells].float()).abs().max()
            errors.append(abs(float(change) / LEARNING_RATE - 1))
    assert errors, "no weight tells the size of its steps"
    return float(torch.tensor(errors).max())  # NaN too


def _check_gradients(training: Training, grads: dict[str, Tensor], reference: Reference) -> float:
    difference = norm = 0.0
    for name, right in reference.gradients.items():
        grad = grads.get(f"{name}_values")
        if grad is None:
            grad = _selected(grads[name], reference.mask[name])
        difference += float((grad - right).norm()) ** 2
        norm += float(right.norm()) ** 2
    error, allowed = (difference / norm) ** 0.5, _TOLERANCE[training.workload.dtype]
    if not error <= allowed:  # NaN too
        raise AssertionError(
            f"its gradients have a relative error of {error:.2e}, allowed {allowed:.2e}"
        )
    return error


def _check_loss(training: Training, reference: Reference) -> None:
    """Allow the loss's own rounding, and 1 % of what the steps changed.

    Adam divides by the size of a gradient, so that rounding in the smallest ones turns steps round.
    """
    loss = training.evaluate()
    rounding = 4 * torch.finfo(training.workload.dtype).eps * abs(reference.loss)
    allowed = rounding + 0.01 * abs(reference.loss - reference.first_loss)
    if not abs(loss - reference.loss) <= allowed:
        raise AssertionError(
            f"its loss is {loss:.6f} after {_STEPS} steps, dense training on masked "
            f"gradients {reference.loss:.6f}, allowed {allowed:.1e} apart"
        )


def _check_weights(weights: dict[str, nn.Parameter], reference: Reference) -> None:
    """Allow a hundredth of a step where the gradient is clear, in fp32; bf16 rounds steps away."""
    all_gradients = torch.cat(list(reference.gradients.values()))
    clear = _CLEAR * float(all_gradients.square().mean().sqrt())
    for name, right in reference.weights.items():
        if weights[name].dtype != torch.float32:
            continue
        error = (_selected(weights[name], reference.mask[name]) - right).abs()
        allowed = 0.01 * LEARNING_RATE + 4 * torch.finfo(torch.float32).eps * right.abs()
        wrong = ~(error <= allowed) & (reference.gradients[name].abs() > clear)
        if wrong.any():
            raise AssertionError(
                f"{int(wrong.sum())} trained weights of {name!r} are off by up to "
                f"{float(error[wrong].max()) / LEARNING_RATE:.2g} steps"
            )
