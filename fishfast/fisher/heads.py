r"""What a model's outputs say of the labels: exact and sampled Fisher as sums over rows.

A row is one number per sample, linear in the outputs. The squares (or absolute values) of the rows'
per-sample gradients add up to the Fisher, so that whoever scores losses can score rows.

Exact, softmax. With :math:`p` the probabilities and :math:`z` the outputs, the gradient of
:math:`-\log p_y` by :math:`z` is :math:`p - e_y`, and its second moment over :math:`y \sim p` is
:math:`\mathrm{diag}(p) - p p^\top = S S^\top`. Its Cholesky factor has a closed form with C-1
columns (Tanabe and Sagae, "An exact Cholesky decomposition and the generalized inverse of the
variance-covariance matrix of the multinomial distribution", 1992), here by the tails
:math:`t_j = \sum_{i > j} p_i`:

.. math:: S_{jj} = \sqrt{p_j t_j / t_{j-1}}, \qquad S_{ij} = -S_{jj} \, p_i / t_j \quad (i > j)

Nothing is subtracted, so small probabilities keep their digits. One column at a time is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fishfast.fisher.losses import describe

__all__ = ["HEADS", "output_rows"]

HEADS = ("softmax", "sigmoid", "gaussian", "tokens")
_MEAN_ABS_NORMAL = math.sqrt(2 / math.pi)
# Elements of a language model's outputs whose probabilities are held at a time.
_CHUNK = 2**24


def output_rows(
    outputs: Tensor,
    head: str,
    fisher_type: str,
    power: int,
    num_label_samples: int = 1,
    generator: torch.Generator | None = None,
    counted: Tensor | None = None,
) -> Iterator[Tensor]:
    r"""Return rows whose per-sample gradients' squares (or absolute values) sum to the Fisher.

    .. math:: \sum_r f(\nabla_\theta \, row_{r,b}) =
              \mathrm{E}_{y \sim p(y | x_b)} f(\nabla_\theta \, {-\log p(y | x_b)})

    with f the square or the absolute value; "sampled" has the mean over ``num_label_samples`` draws
    of y in the place of the expectation. The number of rows:

    =========  ==========================================  ==============  =============  =======
    head       -log p(y | x)                               exact, power 2  exact, power 1 sampled
    =========  ==========================================  ==============  =============  =======
    softmax    cross entropy, outputs [B, C]               C - 1           C (1 if C = 2) K
    sigmoid    binary cross entropy, summed over [B, L]    L               1 if L = 1     K
    gaussian   half the squared error, summed over [B, L]  L               1 if L = 1     K
    tokens     cross entropy of each token of [B, T, V],   refused         refused        K
               mean over the sample's counted positions
    =========  ==========================================  ==============  =============  =======

    A row is made when it is asked for. Probabilities are taken in fp32 (fp64 for fp64 outputs).

    Args:
        outputs: of one forward, with its graph; every row's backward needs it.
        head: what the outputs are, see above.
        fisher_type: "exact" or "sampled".
        power: 2 or 1.
        num_label_samples: K, the draws of "sampled".
        generator: where the draws come from, on any device; nothing else is drawn from. A draw
            does not depend on the device of the outputs.
        counted: for "tokens": bool [B, T], the positions whose token is drawn; default: all.

    Returns:
        An iterator of rows, each ``[B]``.

    Raises:
        TypeError: no generator for "sampled", or ``num_label_samples`` is no integer.
        ValueError: an unknown head or type, outputs of another shape or not finite, or an
            expectation that would need a row for each of exponentially many labels.

    Example:
        >>> import torch
        >>> outputs = torch.tensor([[0.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> (row,) = output_rows(outputs, "softmax", "exact", power=2)
        >>> torch.autograd.grad(row.sum(), outputs)[0]  # sqrt(p0 p1) (1, -1)
        tensor([[ 0.5000, -0.5000],
                [ 0.4434, -0.4434]])
    """
    _check(outputs, head, fisher_type, num_label_samples, generator)
    if head == "tokens":
        counted = _checked_positions(outputs, counted)
    elif counted is not None:
        raise ValueError(f"counted goes with head='tokens'; got head={head!r}; leave it out")
    elif outputs.dim() == 1:
        outputs = outputs.unsqueeze(1)
    if fisher_type == "exact":
        _check_exact(head, power, outputs.shape[1])
        return _exact_rows(outputs, head, power)
    assert generator is not None  # see _check
    return _sampled_rows(outputs, head, power, num_label_samples, generator, counted)


def _exact_rows(outputs: Tensor, head: str, power: int) -> Iterator[Tensor]:
    values = _in_fp32(outputs)
    if head == "softmax":
        yield from _softmax_rows(outputs, values.softmax(1), power)
        return
    if head == "sigmoid":
        variance = values.sigmoid() * values.neg().sigmoid()
        # One label, power 1: both values of the label have the same share p (1 - p).
        scale = variance.sqrt() if power == 2 else 2 * variance
    else:
        scale = torch.full_like(values, 1.0 if power == 2 else _MEAN_ABS_NORMAL)
    for label in range(outputs.shape[1]):
        yield outputs[:, label] * scale[:, label].to(outputs.dtype)


def _softmax_rows(outputs: Tensor, p: Tensor, power: int) -> Iterator[Tensor]:
    classes = p.shape[1]
    if power == 1:
        # Two classes: their gradients are opposite and have the same share, p0 p1.
        drawn, share = (1, 2.0) if classes == 2 else (classes, 1.0)
        for c in range(drawn):
            weight = share * p[:, c : c + 1]
            yield _row(
                outputs, weight * _minus_one_hot(p, torch.full_like(weight, c, dtype=torch.int64))
            )
        return
    for j in range(classes - 1):
        after = p[:, j + 1 :]
        tail = after.sum(1, keepdim=True)
        own = p[:, j : j + 1]
        # 0 / 0 where everything from class j on has underflowed: no variance is left.
        diagonal = ((own / (own + tail)).nan_to_num() * tail).sqrt()
        below = -diagonal * (after / tail).nan_to_num()
        yield _row(outputs[:, j:], torch.cat([diagonal, below], 1))


def _sampled_rows(
    outputs: Tensor,
    head: str,
    power: int,
    draws: int,
    generator: torch.Generator,
    counted: Tensor | None,
) -> Iterator[Tensor]:
    scale = draws**-0.5 if power == 2 else 1 / draws
    for _ in range(draws):
        if head == "tokens":
            assert counted is not None
            coefficients = _drawn_tokens(outputs, counted, scale, generator)
        elif head == "softmax":
            every = torch.ones_like(outputs[:, :1], dtype=torch.bool)
            coefficients = _drawn_tokens(outputs.unsqueeze(1), every, scale, generator)[:, 0]
        elif head == "sigmoid":
            values = _in_fp32(outputs)
            p = values.sigmoid()
            positive = _uniform(values.shape, generator).to(values.device) < p
            coefficients = torch.where(positive, -values.neg().sigmoid(), p) * scale
        else:
            noise = torch.randn(outputs.shape, generator=generator, device=generator.device)
            coefficients = noise.to(outputs.device) * scale
        yield _row(outputs, coefficients)


def _drawn_tokens(
    outputs: Tensor, counted: Tensor, scale: float, generator: torch.Generator
) -> Tensor:
    """Draw a token for every counted position; return the loss's gradient by the outputs."""
    values = outputs.detach()
    coefficients = torch.zeros_like(values)
    samples, positions = counted.nonzero(as_tuple=True)
    uniform = _uniform(samples.shape, generator).to(values.device)
    weight = (scale / counted.sum(1).clamp(min=1).double())[samples]
    rows = max(1, _CHUNK // values.shape[2])
    for b, t, u, w in zip(
        *(x.split(rows) for x in (samples, positions, uniform, weight)), strict=True
    ):
        p = _in_fp32(values[b, t]).softmax(1)
        gradient = w.unsqueeze(1).to(p.dtype) * _minus_one_hot(p, _draw(p, u))
        coefficients[b, t] = gradient.to(values.dtype)
    return coefficients


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index from each row of ``p``, shape [rows, 1], by the inverse of its running sum."""
    # In integers: a class of probability 0 is never drawn, and on a GPU these are the only running
    # sums that torch promises to repeat bit for bit.
    ends = (p * 2.0**40).long().cumsum(1)
    threshold = (uniform.unsqueeze(1) * ends[:, -1:]).long()  # below the last end: uniform < 1
    return torch.searchsorted(ends, threshold, right=True)


def _minus_one_hot(p: Tensor, index: Tensor) -> Tensor:
    """Return p - onehot(index), the entry 1 - p[index] as the sum of the others."""
    others = p.scatter(1, index, 0.0)
    return others.scatter(1, index, -others.sum(1, keepdim=True))


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def _row(outputs: Tensor, coefficients: Tensor) -> Tensor:
    """Sum each sample's outputs by weights; in their own dtype, as their gradient would be."""
    terms = outputs * coefficients.to(outputs.dtype)
    return terms.flatten(1).sum(1, dtype=torch.promote_types(outputs.dtype, torch.float32))


def _in_fp32(outputs: Tensor) -> Tensor:
    return outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))


def _check(
    outputs: Tensor,
    head: str,
    fisher_type: str,
    num_label_samples: int,
    generator: torch.Generator | None,
) -> None:
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}; got {head!r}")
    if fisher_type not in ("exact", "sampled"):
        raise ValueError(
            f"fisher_type must be 'exact' or 'sampled' to score outputs; got {fisher_type!r}"
        )
    if fisher_type == "sampled":
        if isinstance(num_label_samples, bool) or not hasattr(num_label_samples, "__index__"):
            raise TypeError(f"num_label_samples must be an integer; got {num_label_samples!r}")
        if num_label_samples < 1:
            raise ValueError(f"num_label_samples must be at least 1; got {num_label_samples}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                "generator must be a torch.Generator for fisher_type='sampled'; got "
                f"{type(generator).__name__}"
            )
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, Tensor) else describe(outputs)
        raise ValueError(f"outputs must be a real floating-point tensor; got {got}")
    shape = tuple(outputs.shape)
    if head == "tokens" and len(shape) != 3:
        raise ValueError(f"outputs must have shape [B, T, V] for head='tokens'; got {shape}")
    if head == "softmax" and (len(shape) != 2 or shape[1] < 2):
        raise ValueError(
            f"outputs must have shape [B, C], C >= 2, for head='softmax'; got {shape}; 'tokens' is "
            "for a distribution at each position, 'sigmoid' for one yes or no"
        )
    if head in ("sigmoid", "gaussian") and len(shape) not in (1, 2):
        raise ValueError(
            f"outputs must have shape [B] or [B, L] for head={head!r}; got {shape}; flatten(1) "
            "makes every output of a sample one of its L"
        )
    if 0 in shape[1:]:
        raise ValueError(f"outputs must not be empty; got shape {shape}")
    finite = torch.isfinite(outputs.detach()).unsqueeze(-1).flatten(1).all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        raise ValueError(
            f"outputs must be finite; got NaN or infinity for sample {index}; leave classes that "
            "cannot occur out of the outputs"
        )


def _checked_positions(outputs: Tensor, counted: Tensor | None) -> Tensor:
    shape = outputs.shape[:2]
    if counted is None:
        return torch.ones(shape, dtype=torch.bool, device=outputs.device)
    if not isinstance(counted, Tensor) or counted.dtype != torch.bool or counted.shape != shape:
        got = f"{counted.dtype} " if isinstance(counted, Tensor) else ""
        raise ValueError(
            f"counted must be a bool tensor of shape {tuple(shape)}, the outputs' [B, T]; got "
            f"{got}{describe(counted)}"
        )
    return counted.to(outputs.device)


def _check_exact(head: str, power: int, size: int) -> None:
    if head == "tokens":
        raise ValueError(
            "fisher_type='exact' needs one row for each of V**T label sequences for head='tokens'; "
            "use 'sampled' with num_label_samples draws, or 'empirical'"
        )
    if power == 1 and size > 1 and head != "softmax":
        every = (
            f"each of 2**{size} label vectors" if head == "sigmoid" else "infinitely many labels"
        )
        raise ValueError(
            f"fisher_type='exact' with power=1 needs a row for {every} for head={head!r} with "
            f"{size} outputs; use power=2, or 'sampled' with num_label_samples draws"
        )
