"""Ways to train a model, each as one whole step, with as many trained weights wherever they choose.

The contenders: fishfast; full fine-tuning with and without its optimizer step; PEFT's LoRA on all
linear layers (its default, and with adapters in the model's dtype), and on the queries and values
alone; PEFT's SHiRA; and what can be done with masks in torch alone, the dense gradient times the
mask. The number of trained weights is that of LoRA's rank that is nearest to 0.5 % of the model.
All use torch's fused AdamW but fishfast, which has its own. What is not installed or does not run
on a model is `Unavailable` with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fisher_models import Workload
from harness import Unavailable, version, why
from torch import Tensor, nn

import fishfast as ff

__all__ = ["CONTENDERS", "FLOOR", "Budget", "Training", "label", "prepare"]

DENSITY = 0.005
LEARNING_RATE = 1e-4
FLOOR = "forward + backward"

Masks = dict[str, ff.SparseMask]


@dataclasses.dataclass(eq=False)
class Training:
    """A model that is being trained, one batch over and over.

    Args:
        model: what runs the forward.
        workload: the batch and the loss.
        parameters: what trains.
        optimizer: None: the step ends with the gradients.
        mask_gradients: called between backward and clipping.
        handle: what a user would hold beside these.
    """

    model: Callable[..., Any]
    workload: Workload
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    mask_gradients: Callable[[], None] = lambda: None
    handle: Any = None

    @property
    def num_trained(self) -> int:
        """Number of weights that train."""
        return sum(p.numel() for p in self.parameters)

    def loss(self) -> Tensor:
        """Return the batch's mean loss."""
        return self.workload.loss_fn(self.model, self.workload.batches[0]).mean()

    def evaluate(self) -> float:
        """Return the batch's mean loss as a number."""
        with torch.no_grad():
            return float(self.loss())

    def backward(self) -> None:
        """Run forward and backward: gradients are in the parameters."""
        self.loss().backward()
        self.mask_gradients()

    def step(self) -> None:
        """Run forward, backward, clipping and the optimizer's step; the floor stops half-way."""
        self.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many weights train: as many as LoRA's of one rank has.

    Args:
        rank: of LoRA and SHiRA on all linear layers.
        queries_rank: of LoRA on queries and values, nearest to the same number of weights.
        num_selected: of a mask: exactly LoRA's number on all linear layers.
    """

    rank: int
    queries_rank: int
    num_selected: int

    @classmethod
    def of(cls, model: nn.Module) -> Budget:
        """Return the budget of a model.

        Args:
            model: of transformers.
        """
        layers = linear_layers(model)
        per_rank = sum(m.in_features + m.out_features for m in layers.values())
        per_rank_of_queries = sum(
            m.in_features + m.out_features
            for name, m in layers.items()
            if name.endswith(_QUERIES_AND_VALUES)
        )
        num_params = sum(p.numel() for p in model.parameters())
        rank = max(1, round(DENSITY * num_params / per_rank))
        selected = rank * per_rank
        return cls(rank, max(1, round(selected / per_rank_of_queries)), selected)


_QUERIES_AND_VALUES = ("query", "value", "q_proj", "v_proj")


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return what PEFT's "all-linear" adapts: every linear layer but the one to the vocabulary."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }


def fused_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's fastest AdamW, with fishfast's weight decay of 0."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


Build = Callable[[Workload, Budget, Masks], Training]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train.

    Args:
        build: changes the workload's model and returns its training.
        package: whose version goes with its figures.
    """

    build: Build
    package: str = "torch"


def label(name: str) -> str:
    """Return a contender's package with its version.

    Args:
        name: one of `CONTENDERS`.
    """
    package = CONTENDERS[name].package
    return f"{package} {version(package)}"


def prepare(name: str, workload: Workload, budget: Budget, masks: Masks) -> Training:
    """Set a contender up on a model of its own.

    Args:
        name: one of `CONTENDERS`.
        workload: its model is changed.
        budget: how many weights train.
        masks: ``"fish"`` and ``"random"``, of ``budget.num_selected`` weights.

    Raises:
        Unavailable: a peer is not installed, or does not run on this model.
    """
    contender = CONTENDERS[name]
    try:
        training = contender.build(workload, budget, masks)
        if contender.package == "peft":
            training.backward()  # so that it fails here
    except Unavailable:
        raise
    except Exception as error:
        if contender.package != "peft":
            raise
        reason = why(error)
    else:
        for parameter in training.parameters:
            parameter.grad = None
        return training
    raise Unavailable(reason)  # out here: the traceback would keep what was allocated


def _fishfast(mask: str) -> Build:
    def build(workload: Workload, budget: Budget, masks: Masks) -> Training:
        tuned = ff.train_only(workload.model, copy.deepcopy(masks[mask]))  # its memory counts too
        parameters: list[nn.Parameter] = list(tuned.parameters())
        optimizer = ff.AdamW(parameters, lr=LEARNING_RATE)
        return Training(workload.model, workload, parameters, optimizer, handle=tuned)

    return build


def _full(workload: Workload, budget: Budget, masks: Masks) -> Training:
    parameters = list(workload.model.parameters())
    return Training(workload.model, workload, parameters, fused_adamw(parameters))


def _forward_backward(workload: Workload, budget: Budget, masks: Masks) -> Training:
    return Training(workload.model, workload, list(workload.model.parameters()), None)


def _dense_masked(workload: Workload, budget: Budget, masks: Masks) -> Training:
    """Every gradient is multiplied by a mask of zeros and ones in its own dtype."""
    training = _full(workload, budget, masks)
    chosen = masks["fish"]
    dense = {}
    for name, p in workload.model.named_parameters():
        dense[p] = torch.zeros_like(p)
        if name in chosen:
            dense[p].view(-1)[chosen[name].to(p.device).long()] = 1

    def mask_gradients() -> None:
        for p, ones in dense.items():
            if p.grad is not None:
                p.grad.mul_(ones)

    training.mask_gradients = mask_gradients
    return training


def _peft(config: Callable[[Any, Budget, nn.Module], Any], **options: Any) -> Build:
    def build(workload: Workload, budget: Budget, masks: Masks) -> Training:
        import peft

        if options and workload.dtype == torch.float32:
            raise Unavailable("the model is fp32: nothing but LoRA all-linear")
        base = workload.model
        model = peft.get_peft_model(base, config(peft, budget, base), **options)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return Training(model, workload, parameters, fused_adamw(parameters))

    return build


def _lora(peft: Any, budget: Budget, model: nn.Module) -> Any:
    return peft.LoraConfig(r=budget.rank, target_modules="all-linear")


def _lora_on_queries(peft: Any, budget: Budget, model: nn.Module) -> Any:
    return peft.LoraConfig(r=budget.queries_rank, target_modules=list(_QUERIES_AND_VALUES))


def _shira(peft: Any, budget: Budget, model: nn.Module) -> Any:
    """It refuses layers with fewer weights than LoRA's of the same rank, such as a small head."""
    layers = [
        name
        for name, m in linear_layers(model).items()
        if budget.rank * (m.in_features + m.out_features) <= m.weight.numel()
    ]
    return peft.ShiraConfig(r=budget.rank, target_modules=layers, random_seed=0)


CONTENDERS: dict[str, Contender] = {
    FLOOR: Contender(_forward_backward),
    "full fine-tuning": Contender(_full),
    "fishfast": Contender(_fishfast("fish"), "fishfast"),
    "fishfast, random mask": Contender(_fishfast("random"), "fishfast"),
    "LoRA all-linear": Contender(_peft(_lora), "peft"),
    "LoRA all-linear, bf16 adapters": Contender(_peft(_lora, autocast_adapter_dtype=False), "peft"),
    "LoRA on queries and values": Contender(_peft(_lora_on_queries), "peft"),
    "SHiRA": Contender(_peft(_shira), "peft"),
    "dense masked AdamW": Contender(_dense_masked),
}
