"""estimate_fisher over the Triton kernels, in the interpreter: whole models, against torch."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import score
from models import CASES, huggingface
from triton_cpu.running import skip_without_interpreter
from triton_cpu.worker import worker

import fishfast as ff


@pytest.mark.parametrize(
    ("kind", "power"), [("mlp", 1), ("convnet_with_norms", 2), ("bert", 2), ("qwen3_tied", 1)]
)
def test_kernels_give_what_torch_gives(kind, power):
    skip_without_interpreter()
    found, _, checked = worker().call("triton_cpu.whole_model", "scores", (kind, power), 8)
    assert checked["launches"] >= 4
    torch.manual_seed(0)
    expected = score(CASES[kind]() if kind in CASES else huggingface(kind), power=power)
    assert found.keys() == expected.keys()
    # Gradients that cancel to zero (a key bias under softmax) are rounding alone, on both sides.
    largest = max(float(value.max()) for value in expected.values())
    cancelled = largest * (1e-12 if power == 2 else 1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6 * float(value.max()) + cancelled, msg=name
        )


def test_triton_asked_for_where_it_cannot_run():
    case = CASES["mlp"]()
    with pytest.raises(RuntimeError, match="was asked for but cannot run: it runs on CUDA"):
        score(case, backend="triton")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        ff.estimate_fisher(case.model, case.batches, loss_fn=case.loss_fn, backend="cuda")
