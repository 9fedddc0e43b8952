"""Ways to take an AdamW step on the masked weights of a model, or on all of them, and their check.

Each works on the same tuned model: the masked ones on its compact parameters, the dense ones on
its weights. One that cannot run here is `Unavailable` with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from harness import Unavailable, why
from torch import Tensor, nn

import fishfast as ff
from fishfast.training.gradient.tapped_module import CompactParameter

__all__ = ["CONTENDERS", "Step", "check"]

_LR, _BETA1, _BETA2, _EPS = 1e-3, 0.9, 0.999, 1e-8
_ROUNDINGS = 2  # of weights and moments to the weight's dtype; at most half as many were seen


@dataclasses.dataclass(eq=False)
class Step:
    """An optimizer step that can be taken over and over.

    Args:
        run: takes it.
        weights: what it writes to.
        gradients: of the trained entries of each weight.
        indices: which entries of each weight train; None: all.
    """

    run: Callable[[], object]
    weights: list[Tensor]
    gradients: list[Tensor]
    indices: list[Tensor] | None


Build = Callable[[nn.Module, ff.SparseTuning], Step]


def _masked(tuned: ff.SparseTuning, run: Callable[[], object]) -> Step:
    targets = [p.target for p in tuned.parameters()]
    gradients = [p.grad for p in tuned.parameters() if p.grad is not None]
    return Step(run, [t.weight() for t in targets], gradients, [t.indices for t in targets])


def _compact(tuned: ff.SparseTuning) -> list[CompactParameter]:
    parameters = list(tuned.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def _fishfast(model: nn.Module, tuned: ff.SparseTuning) -> Step:
    return _masked(tuned, ff.AdamW(_compact(tuned), lr=_LR).step)


def _in_graph(model: nn.Module, tuned: ff.SparseTuning) -> Step:
    """As a CUDA graph replays it: nothing from the host."""
    parameters = _compact(tuned)
    if parameters[0].device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    optimizer = ff.AdamW(parameters, lr=_LR, capturable=True)
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # makes the state; gradients of 0 move nothing
        torch._foreach_zero_([p.grad for p in parameters])
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for p, gradient in zip(parameters, gradients, strict=True):
        optimizer.state[p]["step"].zero_()
        p.grad.copy_(gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return _masked(tuned, graph.replay)


def _compact_and_scatter(model: nn.Module, tuned: ff.SparseTuning) -> Step:
    optimizer = torch.optim.AdamW(_compact(tuned), lr=_LR, weight_decay=0.0, fused=True)
    tuned.attach(optimizer)
    return _masked(tuned, optimizer.step)


def _compiled(model: nn.Module, tuned: ff.SparseTuning) -> Step:
    """All values, gradients and moments in flat buffers: one compiled update, then the scatter.

    One graph of all scatters, too, takes minutes to compile and launches as many kernels.
    """
    targets = [p.target for p in tuned.parameters()]
    values = torch.cat([p.detach() for p in tuned.parameters()])
    grad = torch.randn_like(values)
    exp_avg, exp_avg_sq = torch.zeros_like(values), torch.zeros_like(values)
    step = torch.zeros((), dtype=torch.float64, device=values.device)  # 1 - b2 needs the digits
    lengths = [len(t.indices) for t in targets]
    weights = [t.weight().detach() for t in targets]
    indices = [t.indices.long() for t in targets]  # what index_copy_ takes
    places = list(zip(weights, indices, values.split(lengths), strict=True))
    update = _compiled_update()
    try:
        update(*(torch.zeros_like(t) for t in (values, grad, exp_avg, exp_avg_sq, step)))
    except Exception as error:  # no C++ compiler, no Triton, a Python that it does not know yet
        raise Unavailable(why(error)) from None

    def run() -> None:
        update(values, grad, exp_avg, exp_avg_sq, step)
        for weight, where, part in places:
            weight.index_copy_(0, where, part.to(weight.dtype))

    return Step(run, weights, list(grad.split(lengths)), indices)


@functools.cache
def _compiled_update() -> Callable[..., None]:
    return torch.compile(_adamw, dynamic=True)


def _adamw(values: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> None:
    step += 1
    step_size = (_LR / (1 - _BETA1**step)).float()
    root = (1 - _BETA2**step).sqrt().float()
    exp_avg.lerp_(grad, 1 - _BETA1)
    exp_avg_sq.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
    values -= step_size * exp_avg / (exp_avg_sq.sqrt() / root + _EPS)


def _dense(**options: bool) -> Build:
    def build(model: nn.Module, tuned: ff.SparseTuning) -> Step:
        weights = [p for p in model.parameters() if not isinstance(p, CompactParameter)]
        gradients = []
        for p in weights:
            p.grad = torch.randn_like(p)
            gradients.append(p.grad)
        optimizer = torch.optim.AdamW(weights, lr=_LR, weight_decay=0.0, **options)
        return Step(optimizer.step, weights, gradients, None)

    return build


CONTENDERS: dict[str, Build] = {
    "fishfast": _fishfast,
    "fishfast in a CUDA graph": _in_graph,
    "torch fused on compact values + scatter": _compact_and_scatter,
    "compiled on compact values + scatter": _compiled,
    "torch fused, dense": _dense(fused=True),
    "torch foreach, dense": _dense(foreach=True),
    "torch for-loop, dense": _dense(foreach=False),  # its default on a CPU
}


def check(step: Step) -> float:
    """Take a step with gradient g and one with -g/2, and compare with what they come to.

    With bias correction the moments are g and g^2, then g (b1 - 1/2) / (1 + b1) and
    g^2 (b2 + 1/4) / (1 + b2).

    Args:
        step: has not been taken yet; is checked as it will be timed.

    Returns:
        The largest error, in steps of size lr.

    Raises:
        AssertionError: a weight is wrong, or one changed that does not train.
    """
    before = [weight.detach().clone() for weight in step.weights]
    gradients = [grad.clone() for grad in step.gradients]
    step.run()
    for grad in step.gradients:
        grad.mul_(-0.5)
    step.run()
    largest = 0.0
    # In float64 one tensor at a time: all of a large model would not fit.
    for position, (weight, old) in enumerate(zip(step.weights, before, strict=True)):
        where = None if step.indices is None else step.indices[position].long()
        largest = max(largest, _check_trained(weight.detach(), old, gradients[position], where))
        if where is not None:
            _check_untouched(weight.detach(), old, where)
    return largest / _LR


def _check_trained(weight: Tensor, old: Tensor, grad: Tensor, where: Tensor | None) -> float:
    found, wanted = (t if where is None else t[where] for t in (weight, old))
    found, wanted, g = found.double(), wanted.double(), grad.double()
    first = g / (g.abs() + _EPS)
    root = ((_BETA2 + 0.25) / (1 + _BETA2)) ** 0.5
    second = g * (_BETA1 - 0.5) / (1 + _BETA1) / (g.abs() * root + _EPS)
    wanted = wanted - _LR * (first + second)
    allowed = _ROUNDINGS * torch.finfo(weight.dtype).eps * (wanted.abs() + 4 * _LR)
    error = (found - wanted).abs()
    largest = float(error.max()) if len(error) else 0.0
    if not bool((error <= allowed).all()):  # NaN too
        raise AssertionError(f"a weight is off by {largest:.2e}")
    return largest


def _check_untouched(weight: Tensor, old: Tensor, where: Tensor) -> None:
    changed = weight != old
    changed[where] = False
    if changed.any():
        raise AssertionError(f"{int(changed.sum())} weights changed that do not train")
