"""Run a primitive of fishfast.kernels where a test says: in the interpreter, or on the card."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest
import torch
from torch import Tensor

from triton_cpu.worker import worker

WHERE = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]

_MODULES = {
    "add_linear": "fishfast.kernels.fisher_linear",
    "add_sum": "fishfast.kernels.fisher_sum",
    "add_embedding": "fishfast.kernels.fisher_embedding",
    "add_conv": "fishfast.kernels.fisher_conv",
}


def run(where: str, primitive: str, score: Tensor, *args, num_sms: int = 8) -> int:
    """Let a primitive add to ``score``, in place; return how many kernels were launched (or -1).

    ``num_sms`` is how many multiprocessors the interpreter pretends to have: samples are divided
    among programs until these are busy.
    """
    module = _MODULES[primitive]
    if where == "cuda":
        on_card = [_to_card(arg) for arg in (score, *args)]
        getattr(importlib.import_module(module), primitive)(*on_card)
        score.copy_(on_card[0])
        return -1
    skip_without_interpreter()
    _, (result, *_), checked = worker().call(module, primitive, (score, *args), num_sms)
    score.copy_(result)
    if checked["launches"]:
        assert checked["loads"], "the checker saw no access"
        assert checked["stores"], "the checker saw no access"
    return checked["launches"]


def skip_without_interpreter() -> None:
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 9):
        pytest.skip(f"the interpreter of triton {version} is not the one that triton_cpu repairs")


def _to_card(argument):
    """Same sizes, strides and offset: what lies between the elements travels along."""
    if not isinstance(argument, Tensor):
        return argument
    storage = torch.empty(0, dtype=argument.dtype, device="cuda")
    whole = argument.untyped_storage().cuda()
    return storage.set_(whole, argument.storage_offset(), argument.size(), argument.stride())
