"""What `top_k_mask` refuses: bad scores, rules and mappings, and scores that change."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from topk_cases import BACKENDS, model_scores

import fishfast as ff
from fishfast.mask.selection.cpu import CpuPasses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "text"),
    [(torch.nan, "nan"), (-torch.nan, "nan"), (-1.0, "-1.0"), (-torch.inf, "-inf")],
    ids=["nan", "minus-nan", "negative", "minus-inf"],
)
def test_bad_scores_are_refused_by_name_and_first_index(value, text, dtype, backend):
    scores = {"good": torch.rand(9, dtype=dtype), "bad": torch.rand(30, 40).to(dtype)}
    scores["bad"] = scores["bad"].T
    scores["bad"][5, 7] = scores["bad"][39, 29] = value
    rule = rf"scores must be >= 0 and not NaN; got {text} at flat index 157 of 'bad'"
    with pytest.raises(ValueError, match=rule):
        ff.top_k_mask(scores, k=2, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_negative_score_is_refused(backend):
    with pytest.raises(ValueError, match=r"got -1\.4\d*e-45 at flat index 1 of 'w'"):
        ff.top_k_mask({"w": torch.tensor([1.0, -1e-45])}, k=1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rules",
    [
        pytest.param({"k": 5, "keep": ["bad"]}, id="kept"),
        pytest.param({"k": 5, "exclude": ["bad"]}, id="excluded"),
        pytest.param({"k": 8, "keep": ["good"]}, id="nothing-left-for-it"),
        pytest.param({"k": 1, "scope": "layer"}, id="no-share-of-the-layers"),
    ],
)
def test_bad_scores_are_refused_wherever_they_are(rules, backend):
    scores = {"good": torch.rand(8), "bad": torch.tensor([1.0, torch.nan])}
    with pytest.raises(ValueError, match="got nan at flat index 1 of 'bad'"):
        ff.top_k_mask(scores, **rules, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"density": 0}, ValueError, r"density must be in \(0, 1\]; got 0$"),
        ({"density": 0.0}, ValueError, r"density must be in \(0, 1\]; got 0.0"),
        ({"density": 1.5}, ValueError, r"density must be in \(0, 1\]; got 1.5"),
        ({"density": -0.1}, ValueError, r"density must be in \(0, 1\]; got -0.1"),
        ({"density": float("nan")}, ValueError, r"density must be in \(0, 1\]; got nan"),
        ({"density": "0.5"}, TypeError, r"density must be a number; got '0.5'"),
        ({"density": True}, TypeError, r"density must be a number; got True"),
        ({"density": 0.5, "k": 3}, ValueError, r"density or k, one of them; got density=0.5, k=3"),
        ({}, ValueError, r"give density or k, one of them; got density=None, k=None"),
        ({"k": 0}, ValueError, r"k must be from 1 to the number of weights, 24; got 0"),
        ({"k": 25}, ValueError, r"k must be from 1 to the number of weights, 24; got 25"),
        ({"k": -1}, ValueError, r"k must be from 1 to the number of weights, 24; got -1"),
        ({"k": 2.0}, TypeError, r"k must be an integer; got 2.0"),
        ({"k": "2"}, TypeError, r"k must be an integer; got '2'"),
        ({"k": True}, TypeError, r"k must be an integer; got True"),
        ({"k": 3, "keep": ["fc"]}, ValueError, r"k must cover the kept part; got k=3 for 8 kept"),
        ({"k": 9, "exclude": ["fc*", "mlp"]}, ValueError, r"not exceed .* not excluded, 4; got 9"),
        ({"k": 1, "scope": "model"}, ValueError, r"scope must be 'global' or 'layer'; got 'model'"),
        ({"k": 1, "backend": "gpu"}, ValueError, r"backend must be 'auto' or one of .*; got 'gpu'"),
        ({"k": 1, "backend": "cuda"}, ValueError, r"must be 'auto' or one of .*; got 'cuda'"),
        ({"k": 9, "keep": ["f"]}, ValueError, r"keep entry 'f' matches no parameter"),
        ({"k": 9, "keep": [""]}, ValueError, r"keep entry '' matches no parameter"),
        ({"k": 9, "keep": ["fc", "*.gamma"]}, ValueError, r"keep entry '\*.gamma' matches no"),
        ({"k": 9, "keep": ["haed"]}, ValueError, r"'haed' matches no .* did you mean head\?"),
        ({"k": 9, "exclude": ["mlp.fc2"]}, ValueError, r"exclude entry 'mlp.fc2' matches no"),
        ({"k": 9, "keep": None}, TypeError, r"keep must be a path, .*; got None; leave keep out"),
        ({"k": 9, "exclude": 3}, TypeError, r"exclude must be a path, .*; got 3; leave exclude"),
        ({"k": 9, "keep": ["tied"]}, ValueError, "a tied weight goes by its first name"),
        ({"k": 9, "keep": [3]}, TypeError, r"keep entries must be strings; got 3"),
        ({"k": 9, "exclude": [None]}, TypeError, r"exclude entries must be strings; got None"),
        ({"k": 9, "keep": ["fc"], "exclude": ["*.bias"]}, ValueError,
         r"keep and exclude must not overlap; both match 'fc.bias'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        ff.top_k_mask(model_scores(), **arguments)


@pytest.mark.parametrize(
    ("scores", "error", "text"),
    [
        pytest.param([], TypeError, "scores must be a mapping .*; got list; est", id="a-list"),
        pytest.param(None, TypeError, "scores must be a mapping .*; got NoneType", id="None"),
        pytest.param({}, ValueError, "at least one weight; got an empty mapping", id="none"),
        pytest.param({"w": torch.rand(0)}, ValueError, "one weight; got an empty model", id="zero"),
        pytest.param({"w": torch.rand(3).double()}, TypeError, "torch.float64 for 'w'", id="fp64"),
        pytest.param({"w": torch.arange(3)}, TypeError, "got torch.int64 for 'w'", id="int64"),
        pytest.param({"w": torch.ones(3) > 0}, TypeError, "got torch.bool for 'w'", id="bool"),
        pytest.param({"w": [1.0, 2.0]}, TypeError, "tensors; got list for 'w'", id="list"),
        pytest.param(
            {"w": torch.eye(3).to_sparse()}, TypeError, "got torch.sparse_coo for 'w'", id="sparse"
        ),
        pytest.param(
            {"a": torch.rand(3), "b": torch.rand(3, device="meta")}, ValueError,
            "scores must be on one device; got 'a' on cpu, 'b' on meta", id="two-devices",
        ),
        pytest.param(
            {"w": torch.rand(3, device="meta")}, ValueError, "scores must have values", id="meta"
        ),
        pytest.param({3: torch.rand(3)}, TypeError, "by names of parameters; got 3", id="no-name"),
    ],
)  # fmt: skip
def test_bad_mappings_are_refused(scores, error, text):
    with pytest.raises(error, match=text):
        ff.top_k_mask(scores, k=1)


def test_scores_that_change_while_they_are_selected_are_noticed(monkeypatch):
    """As another thread's training would: more of them than there is room for."""
    scores = {"w": torch.rand(1000)}
    emit = CpuPasses.emit

    def changed(self, ties, outputs):
        scores["w"].fill_(2.0)
        emit(self, ties, outputs)

    monkeypatch.setattr(CpuPasses, "emit", changed)
    with pytest.raises(RuntimeError, match="scores changed while they were selected"):
        ff.top_k_mask(scores, k=10, backend="cpu")
