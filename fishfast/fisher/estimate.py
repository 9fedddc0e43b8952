"""`estimate_fisher`: the diagonal Fisher information, sample by sample, in batches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishfast import _backend
from fishfast.fisher.losses import labelled_batch_losses
from fishfast.fisher.result import Fisher
from fishfast.fisher.scorer import LossFn, Scorer

__all__ = ["estimate_fisher"]


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    num_samples: int | None = None,
    fisher_type: str = "empirical",
    power: int = 2,
    eval_mode: bool = True,
    progress: bool = False,
) -> Fisher:
    r"""Estimate the diagonal Fisher information of every trainable parameter, exactly per sample.

    .. math:: F = \sum_b \left( \nabla_\theta \, \ell_b \right)^2, \qquad
              \ell_b = -\log p_\theta(y_b | x_b)

    the sum over samples of the square of each sample's own gradient, never the square of a batch's
    gradient. This is N times the empirical Fisher of Sung, Nair and Raffel, "Training Neural
    Networks with Fixed Sparse Masks" (NeurIPS 2021), eq. 3 with the given labels. Batches may have
    any sizes; the result depends on them only by rounding.

    Linear, Embedding, Conv2d, LayerNorm and BatchNorm (fixed statistics) run batched, in one
    backward per batch. Any other use of a parameter is found by an audit of the autograd graph and
    takes one backward per sample, still exact; ``report()`` names those parameters. The memory is
    that of a plain forward and backward: layers that checkpoint in train mode only, as in
    transformers, do not in eval mode.

    Losses that couple samples (a batch mean, a contrastive loss) are refused where the coupling
    reaches every batched layer, and where they are one expanded value. Elsewhere each loss's own
    gradient is exact, but depends on the samples that share its batch.

    Args:
        model: any module; frozen parameters (``requires_grad=False``) are not scored. It is left
            as it was: mode, requires_grad, gradients, hooks and buffers. Hooks on parameters do
            not run while it is scored.
        batches: an iterable of batches, such as a DataLoader. One batch alone is refused if it is a
            mapping, tensor or string; a tuple or list is taken for one of batches.
        loss_fn: ``loss_fn(model, batch)`` returns the B losses of the batch's samples, shape
            ``[B]``. Default: for mappings with ``labels``, see `labelled_batch_losses`.
        num_samples: stop after exactly this many samples; default: all of them.
        fisher_type: ``"empirical"``, the labels given.
        power: 2 sums squares, 1 sums absolute values.
        eval_mode: score in eval mode (default) or in the model's present modes.
        progress: show a progress bar.

    Returns:
        A `Fisher`: name -> fp32 scores of the parameter's shape, on the parameter's device.

    Raises:
        TypeError: ``model`` is not a module, ``loss_fn`` not callable, ``batches`` a mapping,
            tensor, string or no iterable, ``num_samples`` not an integer, or a parameter complex.
        ValueError: no trainable parameter, no sample, an argument out of range, losses that are
            not one finite number per sample, losses that couple samples in every batched layer, a
            reentrant checkpoint, or scores that overflow fp32.

    Note:
        Deterministic for the same batches on the same machine.

    Example:
        >>> import torch, fishfast as ff
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> def loss_fn(model, batch):
        ...     x, y = batch
        ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> fisher = ff.estimate_fisher(model, batches, loss_fn=loss_fn)
        >>> fisher.num_samples, fisher["weight"].shape
        (4, torch.Size([2, 3]))
    """
    _check_arguments(model, loss_fn, batches, num_samples, fisher_type, power)
    with torch.inference_mode(False):  # tensors made here must be able to take part in autograd
        return _estimate(model, batches, loss_fn, num_samples, power, eval_mode, progress)


def _estimate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    num_samples: int | None,
    power: int,
    eval_mode: bool,
    progress: bool,
) -> Fisher:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "model must have parameters with requires_grad=True to score; got "
            f"{type(model).__name__} with none"
        )
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise TypeError(
                f"parameters must be real floating-point tensors; got {p.dtype} for {name!r}"
            )
    _backend.choose("fisher", next(iter(parameters.values())).device)
    scores = {
        name: torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        for name, p in parameters.items()
    }
    scorer = Scorer(model, loss_fn or labelled_batch_losses, parameters, scores, power)
    done = 0
    with _scoring_mode(model, eval_mode), _hooks_set_aside(parameters.values()), tqdm(
        total=num_samples, disable=not progress, unit=" samples", desc="fisher"
    ) as bar:  # fmt: skip
        for batch in batches:
            left = None if num_samples is None else num_samples - done
            counted = scorer.add_batch(batch, left)
            done += counted
            bar.update(counted)
            if done == num_samples:
                break
    if done == 0:
        raise ValueError("batches must give at least one sample; got none")
    if num_samples is not None and done < num_samples:
        warnings.warn(
            f"num_samples={num_samples}, but batches gave only {done} samples", stacklevel=3
        )
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(
                f"the scores of {name!r} are not finite: a sample's gradient is NaN, infinite or "
                "above 1.8e19, whose square overflows fp32; check the losses, or scale them down"
            )
    return Fisher(scores, done, scorer.fallback)


def _check_arguments(
    model: nn.Module,
    loss_fn: LossFn | None,
    batches: Iterable[Any],
    num_samples: int | None,
    fisher_type: str,
    power: int,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function loss_fn(model, batch); got {type(loss_fn).__name__}; "
            "leave it out for the default losses"
        )
    if isinstance(batches, (Mapping, Tensor, str)):
        raise TypeError(
            f"batches must be an iterable of batches; got one {type(batches).__name__}; "
            "pass [batch] to score a single batch"
        )
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches must be an iterable of batches; got one {type(batches).__name__}")
    if num_samples is not None and (
        isinstance(num_samples, bool) or not hasattr(num_samples, "__index__")
    ):
        raise TypeError(f"num_samples must be an integer; got {num_samples!r}")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if fisher_type != "empirical":
        raise ValueError(f"fisher_type must be 'empirical'; got {fisher_type!r}")
    if power not in (1, 2):
        raise ValueError(f"power must be 2 (squares) or 1 (absolute values); got {power!r}")


@contextlib.contextmanager
def _scoring_mode(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """Eval mode while scoring; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"{name or 'the model'!r} must have running statistics; got a "
                f"{type(module).__name__} with track_running_stats=False, which mixes samples in "
                "every mode; replace it"
            )
        if module.training and not eval_mode and (batch_norm or _dropout(module) > 0):
            raise ValueError(
                f"eval_mode=False needs {name or 'the model'!r} in eval mode; got a "
                f"{type(module).__name__} in train mode, which mixes samples or adds noise; "
                "call .eval() on it or leave eval_mode=True"
            )
    try:
        if eval_mode:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _hooks_set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take the tensor hooks off: they would change gradients, or get None for an intercepted one.

    The same dicts are put back, which the hooks' handles refer to.
    """
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        yield
    finally:
        for p, own in hooks:
            p._backward_hooks = own


def _dropout(module: nn.Module) -> float:
    """Return the dropout probability that a module has of its own."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout
    return 0.0
