"""Inputs that torch keeps sparse: bags of words, one-hot rows."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from fisher_checks import assert_as_exact_as_a_loop, score, truth
from models import Calls, Case, classify, parameter
from torch import nn

LAYOUTS = {
    "coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr,
    "not-coalesced": lambda x: torch.sparse_coo_tensor(
        torch.cat([x.nonzero().T] * 2, 1), torch.cat([x[x != 0] / 2] * 2), x.shape,
        check_invariants=False,
    ),
}  # fmt: skip

MODELS = {
    "linear": lambda: nn.Linear(20, 4),
    "linear-without-bias": lambda: nn.Linear(20, 4, bias=False),
    "layers-behind": lambda: nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 4)),
    "matmul": lambda: Calls(lambda self, x: x @ self.w, w=parameter(20, 4)),
    "mm": lambda: Calls(lambda self, x: torch.mm(x, self.w), w=parameter(20, 4)),
    "sparse-mm": lambda: Calls(lambda self, x: torch.sparse.mm(x, self.w), w=parameter(20, 4)),
    "twice": lambda: Calls(
        lambda self, x: torch.tanh(x @ self.w) * (x @ (2 * self.w)), w=parameter(20, 4)
    ),
    "functional-with-a-shift": lambda: Calls(
        lambda self, x: F.linear(x, self.w) + self.b, w=parameter(4, 20), b=parameter(4)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs_are_exact(name, layout):
    torch.manual_seed(0)
    dense = [(F.dropout(torch.rand(n, 20), 0.8), torch.arange(n) % 4) for n in (4, 1, 5)]
    case = Case(MODELS[name](), dense, classify)
    exact, plain = truth(case), truth(case, torch.float32)
    case.batches = [(LAYOUTS[layout](x), y) for x, y in dense]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that its layouts are in beta
        fisher = score(case)
    assert_as_exact_as_a_loop(fisher, exact, plain)
    assert set(fisher.fallback) <= ({"w"} if name == "sparse-mm" else set())
