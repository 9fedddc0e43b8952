"""`get_fish_model`: score, mask and train_only in one call, in PEFT's manner."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fishfast._wrappers import unwrapped
from fishfast.delta.delta import load_delta, save_delta
from fishfast.files.atomic import PathLike
from fishfast.fisher import estimate_fisher
from fishfast.fisher.objective import LossFn, OutputsFn
from fishfast.hub.config import FishConfig
from fishfast.mask.budget import Totals, budget
from fishfast.mask.names import split_by_rule
from fishfast.mask.sparse_mask import SparseMask
from fishfast.mask.topk_mask import top_k_mask
from fishfast.training.handle import SparseTuning
from fishfast.training.train_only import train_only

__all__ = ["CONFIG_NAME", "DELTA_NAME", "FishTuning", "from_pretrained", "get_fish_model"]

CONFIG_NAME, DELTA_NAME = "fish_config.json", "fish_delta.safetensors"


class FishTuning(SparseTuning):
    """The handle at ``model.fish``: a `SparseTuning` that knows how its mask was made.

    Attributes:
        config: how the first mask was made.
    """

    config: FishConfig

    @classmethod
    def on(cls, model: nn.Module, mask: SparseMask, config: FishConfig) -> FishTuning:
        """Tune a model and put the handle at its ``fish``.

        Args:
            model: changed in place.
            mask: which weights to train.
            config: how it was made.

        Returns:
            The handle.

        Raises:
            ValueError: ``model`` has something else at ``fish``; and as `train_only`.
        """
        _refuse_other_fish(model)
        tuned = train_only(model, mask)
        handle = cls(tuned.model, mask, tuned.base, tuned._trainable)
        handle.config = config
        tuned.model.fish = handle  # type: ignore[assignment]
        return handle

    def save_pretrained(self, save_directory: PathLike) -> None:
        """Write the config and the delta into a folder, which is made if it is not there.

        The base model is not in it; ``model.save_pretrained`` of transformers writes the whole.

        Args:
            save_directory: the folder.

        Raises:
            RuntimeError: as `save_delta`, like its other errors. No file is changed then.
        """
        os.makedirs(save_directory, exist_ok=True)
        save_delta(self, Path(save_directory) / DELTA_NAME)
        self.config.to_json_file(Path(save_directory) / CONFIG_NAME)

    def release(self) -> nn.Module:
        """Give the plain module back: trained weights in place, no ``fish``."""
        model = super().release()
        model.__dict__.pop("fish", None)
        return model


def get_fish_model(
    model: nn.Module,
    config: FishConfig,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    outputs_fn: OutputsFn | None = None,
) -> nn.Module:
    """Score a model, make its FISH mask and train only that.

    The same as `estimate_fisher`, `top_k_mask` and `train_only` one after the other. Mistakes in
    ``keep``, ``exclude`` and ``k`` are named before anything is scored.

    Args:
        model: changed in place; parameters with ``requires_grad=False`` are not scored.
        config: how.
        batches: an iterable of batches, as for `estimate_fisher`.
        loss_fn: as there; default: for mappings with ``labels``.
        outputs_fn: as there; for exact and sampled.

    Returns:
        The model itself, an ``nn.Module`` as before, with the handle at ``model.fish``.

    Raises:
        TypeError: ``config`` is no `FishConfig`; and as the three functions.
        ValueError: as the three functions.

    Note:
        Deterministic for the same batches on the same machine.

    Example:
        >>> import tempfile, torch, fishfast as ff
        >>> net = torch.nn.Linear(3, 2)
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.cross_entropy(
        ...         model(batch[0]), batch[1], reduction="none"
        ...     )
        >>> base = {name: value.clone() for name, value in net.state_dict().items()}
        >>> model = ff.get_fish_model(net, ff.FishConfig(k=4, keep="bias"), batches, loss_fn)
        >>> model.fish.print_trainable_parameters()
        trainable params: 4 || all params: 8 || trainable%: 50.0000
        >>> optimizer = ff.AdamW(model.fish.parameters(), lr=0.1)
        >>> loss_fn(model, batches[0]).mean().backward()
        >>> optimizer.step()
        >>> again = torch.nn.Linear(3, 2)
        >>> again.load_state_dict(base)
        <All keys matched successfully>
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.fish.save_pretrained(folder)
        ...     again = ff.from_pretrained(again, folder)
        >>> torch.equal(again.state_dict()["weight"], model.state_dict()["weight"])
        True
    """
    if not isinstance(config, FishConfig):
        raise TypeError(f"config must be a FishConfig; got {type(config).__name__}")
    if isinstance(model, nn.Module):  # estimate_fisher says what else is wrong with it
        _refuse_other_fish(model)
        sizes = {
            name: p.numel() for name, p in unwrapped(model).named_parameters() if p.requires_grad
        }
        kept, eligible = split_by_rule(list(sizes), config.keep, config.exclude)
        budget(Totals.of(sizes, kept, eligible), kept, density=config.density, k=config.k)
    fisher = estimate_fisher(
        model, batches, loss_fn=loss_fn, outputs_fn=outputs_fn, num_samples=config.num_samples,
        fisher_type=config.fisher_type, head=config.head,
        num_label_samples=config.num_label_samples, seed=config.seed, power=config.power,
    )  # fmt: skip
    mask = top_k_mask(
        fisher, density=config.density, k=config.k, keep=config.keep, exclude=config.exclude,
        scope=config.scope,
    )  # fmt: skip
    FishTuning.on(model, mask, config)
    return model


def from_pretrained(model: nn.Module, save_directory: PathLike) -> nn.Module:
    """Put what ``model.fish.save_pretrained`` wrote onto the base model.

    The model runs as the trained one did, bit for bit, and may be trained further;
    ``model.fish.release()`` gives the plain module.

    Args:
        model: the base model, changed in place. Weights that are masked whole, such as a new
            head, may have any values.
        save_directory: the folder.

    Returns:
        The model itself, with the handle at ``model.fish``.

    Raises:
        FileNotFoundError: a file is not there.
        TypeError: ``model`` is no module.
        ValueError: a file that is damaged, or another base model. The model is left as it was.
        RuntimeError: the model has a mask already.

    Example:
        See `get_fish_model`.
    """
    config = FishConfig.from_json_file(Path(save_directory) / CONFIG_NAME)
    delta = load_delta(Path(save_directory) / DELTA_NAME)
    grads = [(p, p.grad) for p in model.parameters()] if isinstance(model, nn.Module) else []
    handle = FishTuning.on(model, delta.mask, config)
    try:
        delta.refuse_other_base(handle.base)
        delta.apply_(model, check_base=False)
    except BaseException:
        handle.release()
        for parameter, grad in grads:
            parameter.grad = grad
        raise
    return model


def _refuse_other_fish(model: nn.Module) -> None:
    fish = getattr(model, "fish", None)
    if fish is not None and not isinstance(fish, SparseTuning):
        raise ValueError(
            "model must not have an attribute 'fish' of its own; the handle goes there"
        )
