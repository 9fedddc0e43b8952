"""What Python around the kernels costs: models so small that nothing else takes time.

A pass of tiny tensors on one thread is host work only. It is the same work in front of a GPU, which
waits for it where a layer's kernels are short. The figure is the least CPU time of many passes: a
busy machine makes a pass longer, never shorter. Ways are run in turns within one process.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import Unavailable
from torch import Tensor, nn

import fishfast as ff

__all__ = [
    "MODELS", "WAYS", "Pass", "least_seconds", "one_thread", "passes", "scored_seconds",
]  # fmt: skip

_TINY = {"vocab_size": 200, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_BATCH, _LENGTH = 2, 8
DENSITY = 0.05


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_hidden_layers=24, **_TINY))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=16, num_key_value_heads=2, **_TINY))


# Each with the labels of a batch, from its tokens.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "BERT of 24 layers": (_bert, lambda tokens: tokens[:, 0] % 2),
    "Llama of 16 layers": (_llama, lambda tokens: tokens),
}


class Pass:
    """Forward and backward of one model on one batch.

    Args:
        model: in train mode, without dropout's random numbers mattering.
        batch: its keyword arguments.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def backward(self) -> None:
        """Run forward and backward, and drop the gradients."""
        self.model(**self.batch).loss.backward()
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self) -> None:
        """Run the forward in no_grad mode."""
        with torch.no_grad():
            self.model(**self.batch)


def _tuned(model: nn.Module) -> nn.Module:
    ff.train_only(model, ff.random_mask(model, density=DENSITY, seed=0))
    return model


def _lora(model: nn.Module) -> Any:
    try:
        import peft
    except ImportError as error:
        raise Unavailable("needs peft, not installed") from error
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "full fine-tuning": lambda model: model,
    "fishfast": _tuned,
    "LoRA all-linear": _lora,
}


def passes(case: str, ways: list[str]) -> dict[str, Pass]:
    """Return the passes of one model, trained in several ways.

    Args:
        case: one of `MODELS`.
        ways: of `WAYS`.

    Raises:
        Unavailable: peft is not installed.
    """
    make, labels = MODELS[case]
    tokens = torch.randint(5, 200, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": labels(tokens)}
    found = {}
    for way in ways:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[way] = Pass(WAYS[way](make()), batch)
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def least_seconds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the least CPU time of each, run in turns.

    Args:
        runs: by name.
        rounds: how many turns, after one that is not counted.
    """
    least = dict.fromkeys(runs, float("inf"))
    with one_thread():
        for turn in range(rounds + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                seconds = time.process_time() - start
                if turn:
                    least[name] = min(least[name], seconds)
    return least


def scored_seconds(plain: Pass, rounds: int) -> dict[str, float]:
    """Return the least CPU time of a plain pass, a first scored batch and a further one.

    Args:
        plain: its model is scored, on its batch.
        rounds: how many runs of a few batches, each in turns with plain passes.

    Returns:
        "plain", "first" and "further", in seconds.
    """
    least = dict.fromkeys(("plain", "first", "further"), float("inf"))

    def note(what: str, start: float) -> None:
        least[what] = min(least[what], time.process_time() - start)

    def batches() -> Iterator[dict[str, Tensor]]:
        # What runs between two of these is the scoring of one. In the fifth it looks at rows again.
        for what in ("first", "further", "further", "further"):
            start = time.process_time()
            yield plain.batch
            note(what, start)

    with one_thread():
        plain.backward()
        for _ in range(rounds):
            for _ in range(3):
                start = time.process_time()
                plain.backward()
                note("plain", start)
            ff.estimate_fisher(plain.model, batches())
    return least
