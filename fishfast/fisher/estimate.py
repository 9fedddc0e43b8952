"""`estimate_fisher`: the diagonal Fisher information, sample by sample, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fishfast import _backend
from fishfast._lazy import refuse_lazy
from fishfast._wrappers import unwrapped
from fishfast.files.atomic import PathLike
from fishfast.fisher.distributed import all_reduce_, announce_failure
from fishfast.fisher.engine.accumulator import Accumulator
from fishfast.fisher.engine.score_memory import checked_device, zero_scores
from fishfast.fisher.engine.scorer import Scorer
from fishfast.fisher.foreign import as_sharded, refuse_sample_hooks
from fishfast.fisher.heads import HEADS
from fishfast.fisher.kind import FISHER_TYPES
from fishfast.fisher.losses import labelled_batch_losses
from fishfast.fisher.objective import LossFn, OutputsFn, empirical, over_labels
from fishfast.fisher.result import Fisher
from fishfast.fisher.run import Run
from fishfast.fisher.running import RunningScores
from fishfast.fisher.untouched import buffers_put_back, hooks_set_aside, scoring_mode

__all__ = ["estimate_fisher"]


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    num_samples: int | None = None,
    fisher_type: str = "empirical",
    outputs_fn: OutputsFn | None = None,
    head: str | None = None,
    num_label_samples: int = 1,
    seed: int = 0,
    power: int = 2,
    eval_mode: bool = True,
    progress: bool = False,
    resume_path: PathLike | None = None,
    save_every: float = 60.0,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    scores_device: torch.device | str | None = None,
) -> Fisher:
    r"""Estimate the diagonal Fisher information of every trainable parameter, exactly per sample.

    .. math:: F = \sum_b \left( \nabla_\theta \, \ell_b \right)^2, \qquad
              \ell_b = -\log p_\theta(y_b | x_b)

    the sum over samples of the square of each sample's own gradient, never the square of a batch's
    gradient. This is N times the Fisher of Sung, Nair and Raffel, "Training Neural Networks with
    Fixed Sparse Masks" (NeurIPS 2021): eq. 3 with the given labels ("empirical"), eq. 2 with the
    expectation over the model's own labels ("exact", or "sampled" from it). Batches may have any
    sizes; the result depends on them only by rounding (and, if sampled, by which draw is whose).

    Everything runs batched in one backward per batch, without weight gradients: matrix products,
    convolutions, embeddings, normalisations and elementwise calls, whatever the order of their
    rows, and weights that are shared, tied, viewed or computed. An audit of the autograd graph
    finds every other use of a parameter, which takes one backward per sample, still exact;
    ``report()`` says which parameters took which road and what it cost. In the first batch (and
    where sizes or selected rows leave it open) two more backwards, three above 16 samples, find out
    which row belongs to which sample. The memory
    is that of a forward and backward; layers that checkpoint in train mode only, as in
    transformers, do not in eval mode.

    The forward runs once for each batch, and again for the first where weights are caught better
    further on: from the same batch, buffers and random state, and with the same losses. Hooks on
    activations run in every backward, as the forward left them.

    Losses that couple samples (a batch mean, a contrastive loss) are refused where the coupling
    reaches every batched layer, and where they are one expanded value. Elsewhere each loss's own
    gradient is exact, but depends on the samples that share its batch.

    Args:
        model: any module; frozen parameters (``requires_grad=False``) are not scored. It is left
            as it was: mode, requires_grad, gradients, hooks and buffers. So is the random state:
            noise that a model draws comes from a state of the scoring's own. Hooks on parameters
            do not run while it is scored. Of a DistributedDataParallel, the inside is scored.
        batches: an iterable of batches, such as a DataLoader. One batch alone is refused if it is a
            mapping, tensor or string; a tuple or list is taken for one of batches. Each forward
            gets copies of a batch's containers and objects, with the tensors themselves.
        loss_fn: ``loss_fn(model, batch)`` returns the B losses of the batch's samples, shape
            ``[B]``. Default: for mappings with ``labels``, see `labelled_batch_losses`.
            "empirical" only.
        num_samples: stop after exactly this many samples (of this process); default: all of them.
        fisher_type: ``"empirical"``: the labels given. ``"exact"``: all labels, weighted by the
            model's probabilities, in C - 1 backwards for C classes. ``"sampled"``: labels drawn.
        outputs_fn: for exact and sampled: ``outputs_fn(model, batch)`` returns logits or means,
            ``[B, C]``. Default: the logits of a transformers-style model. For "tokens" a pair with
            bool ``[B, T]``, which positions count, may be returned; default: all.
        head: what ``outputs_fn`` returns: ``"softmax"`` (default), ``"sigmoid"``, ``"gaussian"``
            (unit variance), or ``"tokens"`` of a language model ``[B, T, V]`` (sampled only).
        num_label_samples: draws for each sample, whose mean is taken; "sampled" only.
        seed: of the draws; in a process group the rank is added. No global generator is touched.
        power: 2 sums squares, 1 sums absolute values.
        eval_mode: score in eval mode (default) or in the model's present modes.
        progress: show a progress bar.
        resume_path: a file for the running scores, saved every ``save_every`` seconds and at the
            end. If it exists, the run goes on where it stopped: the batches scored are skipped,
            which must come in the same order again. The model's weights are not compared.
        save_every: seconds.
        process_group: sum over its processes, each with batches of its own; every process gets
            the same scores. Each needs its own ``resume_path``.
        backend: ``"auto"``, ``"cpu"`` (compiled), ``"triton"`` or ``"torch"``.
        scores_device: where the scores live, with the same bits. Default: each on its parameter's
            device, 4 bytes a weight. ``"cpu"`` keeps them in the host's memory; a layer's scores
            come to its device and go back in each batch, of which at most 256 MB and those of a
            call are there at once.

    Returns:
        A `Fisher`: name -> fp32 scores of the parameter's shape, on the parameter's device or
        ``scores_device``. They share memory: ``clone()`` one before you save or keep it by itself.

    Raises:
        TypeError: ``model`` is not a module, a function is not callable, ``batches`` a mapping,
            tensor, string or no iterable, a number not an integer, or a parameter complex.
        ValueError: no trainable parameter, a lazy one, no sample, an argument out of range or that
            goes with another ``fisher_type``, losses that are not one finite number per sample,
            losses that couple samples in every batched layer, that depend on none of the model's
            parameters or that change when a forward has to run again, a hook that changes from
            backward to backward, gradients that are not finite (with
            the sample and the parameter), scores that overflow fp32, a file or processes of
            another run.

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
        >>> exact = ff.estimate_fisher(
        ...     model, batches, fisher_type="exact", outputs_fn=lambda model, batch: model(batch[0])
        ... )
    """
    _check_arguments(model, loss_fn, batches, num_samples, fisher_type, power)
    model = unwrapped(model)
    seed = _checked_seed(seed, process_group)
    if not save_every >= 0:
        raise ValueError(f"save_every must be at least 0 seconds; got {save_every!r}")
    _check_labels(loss_fn, fisher_type, outputs_fn, head, num_label_samples)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    parameters, device = _trainable(model), checked_device(scores_device)
    _backend.choose("fisher", next(iter(parameters.values())).device, backend)
    generator = torch.Generator().manual_seed(seed)
    if fisher_type == "empirical":
        objective = empirical(loss_fn or labelled_batch_losses)
    else:
        objective = over_labels(outputs_fn, head, fisher_type, power, num_label_samples, generator)
    with torch.inference_mode(False):  # tensors made here must be able to take part in autograd
        stored = zero_scores(parameters, device)
        scores: dict[str, Tensor] = {}
        scorer = Scorer(model, objective, parameters, stored, Accumulator(power, backend))
        run = Run(scorer, fisher_type, num_samples)
        try:  # what fails in one process only, such as a folder, is announced to the others
            if resume_path is not None and fisher_type == "sampled":
                run.running = RunningScores(
                    resume_path, save_every, seed=seed, num_label_samples=num_label_samples,
                    generator=generator,
                )  # fmt: skip
            elif resume_path is not None:
                run.running = RunningScores(resume_path, save_every)
            with (
                scoring_mode(model, eval_mode),
                hooks_set_aside(parameters.values()),
                buffers_put_back(model),
            ):
                run.score(batches, progress)
            scores = {name: score.contiguous() for name, score in stored.kept.items()}
        except BaseException as error:
            if process_group is not None:
                announce_failure(error, stored.kept, process_group)
            raise
        counts = [run.num_samples, run.num_batches]
        if process_group is not None:
            counts = all_reduce_(
                scores, counts, process_group, fisher_type=fisher_type, power=power
            )
    _check_scores(scores, counts[0])
    return run.result(as_sharded(scores, parameters), *counts)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    refuse_lazy(model)
    refuse_sample_hooks(model)
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
    return parameters


def _check_scores(scores: Mapping[str, Tensor], num_samples: int) -> None:
    if num_samples == 0:
        raise ValueError("batches must give at least one sample; got none")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(
                f"the scores of {name!r} are not finite: a sample's gradient is NaN, infinite or "
                "above 1.8e19, whose square overflows fp32; check the losses, or scale them down"
            )


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
    if fisher_type not in FISHER_TYPES:
        raise ValueError(
            f"fisher_type must be one of {', '.join(map(repr, FISHER_TYPES))}; got {fisher_type!r}"
        )
    if power not in (1, 2):
        raise ValueError(f"power must be 2 (squares) or 1 (absolute values); got {power!r}")


def _checked_seed(seed: int, process_group: dist.ProcessGroup | None) -> int:
    """Return a seed that is not that of another process."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer; got {seed!r}")
    return seed + (dist.get_rank(process_group) if process_group is not None else 0)


def _check_labels(
    loss_fn: LossFn | None,
    fisher_type: str,
    outputs_fn: OutputsFn | None,
    head: str | None,
    num_label_samples: int,
) -> None:
    if fisher_type == "empirical" and (outputs_fn is not None or head is not None):
        raise ValueError(
            "outputs_fn and head go with fisher_type='exact' or 'sampled'; got fisher_type="
            "'empirical'; pass loss_fn"
        )
    if fisher_type != "empirical" and loss_fn is not None:
        raise ValueError(
            f"loss_fn goes with fisher_type='empirical'; got fisher_type={fisher_type!r}, whose "
            "labels come from the model; pass outputs_fn and head"
        )
    if outputs_fn is not None and not callable(outputs_fn):
        raise TypeError(f"outputs_fn must be a function; got {type(outputs_fn).__name__}")
    if head is not None and head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}; got {head!r}")
    if head is not None and outputs_fn is None:
        raise ValueError(f"head goes with outputs_fn; got head={head!r} without one; pass both")
    if fisher_type != "sampled" and num_label_samples != 1:
        raise ValueError(
            f"num_label_samples goes with fisher_type='sampled'; got {num_label_samples} with "
            f"{fisher_type!r}"
        )
