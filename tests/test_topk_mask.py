"""`top_k_mask` against numpy's stable sort: the same k, the same order, the same bits."""

from __future__ import annotations

import pickle
import time
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from cases import CHUNK, DTYPES, SIZES, VALUES

import fishfast as ff
from fishfast import _backend
from fishfast.topk_mask.select_cpu import CpuPasses

# "simulated": the CUDA kernels and the Python above them, on CPU tensors.
BACKENDS = ["cpu", "torch", "simulated"]


def named(sizes, make, dtype=torch.float32):
    return {f"t{i}": make(n).to(dtype) for i, n in enumerate(sizes)}


def assert_is_top_k(mask, scores, k):
    """The mask selects what the stable sort puts first, in ascending int32 indices."""
    truth = oracle.top_k(scores, k)
    assert list(mask) == list(scores)
    for name, found in mask.items():
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), truth[name], err_msg=name)
    zeros = sum(
        int((scores[name].reshape(-1)[found.long()] == 0).sum()) for name, found in mask.items()
    )
    assert mask.num_zero_score == zeros


def some_k(n):
    """Return the smallest, the largest and some between."""
    return sorted({min(max(1, k), n) for k in (1, 2, n // 200, n // 3, n - 1, n)})


@pytest.fixture
def threads(monkeypatch):
    """Set torch's number of threads, which all work then; put back afterwards."""
    monkeypatch.setattr(_backend, "_START_OF_THREADS", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the k largest, ties to the lowest (tensor, index) --------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make", [VALUES[0], VALUES[1]])
def test_sizes(sizes, make, backend):
    scores = named(sizes, make)
    for k in some_k(sum(sizes)):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", VALUES)
def test_values(make, dtype, backend):
    scores = named([31, 1009, 0, 4001], make, dtype)
    for k in some_k(5041):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_k_of_a_small_model(backend):
    scores = named([5, 0, 1, 13], VALUES[1].values[0])
    for k in range(1, 20):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_fp16_pattern_is_ordered(backend):
    bits = torch.arange(0x7C01, dtype=torch.int16)[torch.randperm(0x7C01)]  # 0 to +inf
    scores = {"w": bits.view(torch.float16)}
    for k in (1, 1025, 30000, 0x7C00):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_are_compared_by_value(backend):
    """0.3 is smaller in bf16 than in fp32, and larger in fp16 than both."""
    scores = {
        "fp32": torch.tensor([0.3, 0.25, 0.0, 70000.0]),
        "bf16": torch.tensor([0.3, 0.25, -0.0, 70000.0], dtype=torch.bfloat16),
        "fp16": torch.tensor([0.3, 0.25, 6e-8, 65504.0], dtype=torch.float16),
    }
    for k in range(1, 13):
        assert_is_top_k(ff.top_k_mask(scores, k=k, backend=backend), scores, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[:, ::3], id="strided"),
        pytest.param(lambda t: t[7:], id="with-an-offset"),
        pytest.param(lambda t: t[:1].expand(50, -1), id="expanded"),
        pytest.param(
            lambda t: t.view(10, 5, 8, 5).to(memory_format=torch.channels_last), id="nhwc"
        ),
        pytest.param(lambda t: torch.nn.Parameter(t), id="a-parameter"),
        pytest.param(lambda t: t[3, 4], id="a-scalar"),
    ],
)
def test_indices_count_in_row_major_order_of_the_shape(view, backend):
    scores = {"a": view(_few(50, 40)), "b": _few(9)}
    for k in some_k(scores["a"].numel() + 9):
        mask = ff.top_k_mask(scores, k=k, backend=backend)
        assert_is_top_k(mask, {name: s.detach() for name, s in scores.items()}, k)
        assert mask.shapes["a"] == tuple(scores["a"].shape)


def _few(*shape):
    return torch.randint(0, 7, shape).float()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ten_thousand_tiny_tensors(backend):
    scores = {f"t{i}": score for i, score in enumerate(_few(20_000).split([1, 3, 0, 4] * 2500))}
    started = time.perf_counter()
    mask = ff.top_k_mask(scores, density=0.1, backend=backend)
    assert time.perf_counter() - started < 20  # about 1; was 90 with one histogram per tensor
    assert_is_top_k(mask, scores, 2000)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_mask(threads, count):
    sizes = [5 * CHUNK + 3, 100, 3 * CHUNK]
    scores = named(sizes, VALUES[1].values[0])
    threads(1)
    expected = ff.top_k_mask(scores, density=0.3, backend="cpu")
    threads(count)
    for _ in range(3):
        mask = ff.top_k_mask(scores, density=0.3, backend="cpu")
        assert mask == expected
        assert all(torch.equal(mask[name], expected[name]) for name in scores)


def test_backends_agree(simulated):
    scores = named([3 * CHUNK + 5, 17, 2 * CHUNK], VALUES[-1].values[0])
    masks = [ff.top_k_mask(scores, density=0.02, backend=backend) for backend in BACKENDS]
    assert masks[0] == masks[1] == masks[2]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("make", [VALUES[0], VALUES[1], VALUES[4]])
def test_a_smaller_budget_selects_a_subset(make, scope):
    scores = named([5000, 300, 0, 40_000, 77], make)
    rules = {"scope": scope, "keep": "t4"}
    wide, narrow = (ff.top_k_mask(scores, density=d, **rules) for d in (0.02, 0.005))
    assert narrow.num_selected == 226
    for name in scores:
        assert set(narrow[name].tolist()) <= set(wide[name].tolist())


def test_scores_are_left_as_they_were(simulated):
    scores = named([100, 33], VALUES[0].values[0])
    scores["t0"] = scores["t0"].view(10, 10).T
    before = {name: score.clone() for name, score in scores.items()}
    for backend in BACKENDS:
        ff.top_k_mask(scores, k=10, backend=backend)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


@pytest.mark.large
@pytest.mark.timeout(1200)
def test_more_than_2_to_the_31_scores_in_one_tensor():
    n = 2**31 + 100
    scores = {"big": torch.zeros(n, dtype=torch.bfloat16), "small": torch.zeros(5)}
    places = [0, CHUNK, 2**31 - 1, 2**31, n - 1]
    scores["big"][places] = 2.0
    scores["small"][4] = 1.0
    mask = ff.top_k_mask(scores, k=8, backend="cpu")
    # 5 twos, 1 one, then the zeros with the lowest index.
    assert mask["big"].tolist() == [0, 1, 2, CHUNK, 2**31 - 1, 2**31, n - 1]
    assert mask["big"].dtype == torch.int64
    assert mask["small"].tolist() == [4]
    assert mask["small"].dtype == torch.int32
    assert (mask.num_params, mask.num_zero_score) == (n + 5, 2)
    scores["big"][n - 2] = torch.nan
    with pytest.raises(ValueError, match=f"nan at flat index {n - 2} of 'big'"):
        ff.top_k_mask(scores, k=8, backend="cpu")


# ---- budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "density", "k"),
    [
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (100, 0.07, 7),
        (1000, 0.005, 5),
        (100, 0.299, 29),
        (3, 1 / 3, 1),
        (100, 1e-9, 1),
        (100, 1, 100),
        (100, 1.0, 100),
        (7, 0.5, 3),
        (100, np.float32(0.29), 29),
        (100, Fraction(1, 3), 33),
    ],
)
def test_density_is_rounded_down_from_the_decimal_as_written(n, density, k):
    assert ff.top_k_mask({"w": torch.rand(n)}, density=density).num_selected == k


@pytest.mark.parametrize("k", [np.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
def test_k_may_be_any_integer_type(k):
    assert ff.top_k_mask({"w": torch.rand(9)}, k=k).num_selected == 3


# ---- scope="layer" -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_scope_gives_every_tensor_its_share(backend):
    scores = {"a": torch.rand(100) + 10, "b": torch.rand(300), "c": torch.rand(0)}
    mask = ff.top_k_mask(scores, density=0.1, scope="layer", backend=backend)
    for name, k in (("a", 10), ("b", 30)):
        alone = {name: scores[name]}
        assert mask[name].tolist() == oracle.top_k(alone, k)[name].tolist()
    assert mask["c"].tolist() == []


def test_layer_scope_rounds_shares_to_the_nearest():
    sizes = {"a": 10, "b": 25, "c": 65}  # of 11: 1.1, 2.75, 7.15
    mask = ff.top_k_mask({name: torch.rand(n) for name, n in sizes.items()}, k=11, scope="layer")
    assert [len(found) for found in mask.values()] == [1, 3, 7]


@pytest.mark.parametrize("sizes", [[1, 1, 1], [6, 6, 2], [0, 5, 90, 3, 0, 12], [43, 1, 2, 3, 4]])
def test_layer_shares_are_the_highest_claims(sizes):
    """By 6, 6 and 2, largest remainders give 10 and 11 the shares 4, 4, 2 and 5, 5, 1."""
    claims = sorted((Fraction(-n, 2 * s + 1), i) for i, n in enumerate(sizes) for s in range(n))
    scores = {f"t{i}": torch.rand(n) for i, n in enumerate(sizes)}
    for k in range(1, sum(sizes) + 1):
        mask = ff.top_k_mask(scores, k=k, scope="layer", backend="torch")
        met = [i for _, i in claims[:k]]
        assert [len(found) for found in mask.values()] == [met.count(i) for i in range(len(sizes))]


def test_layer_scope_shares_what_keep_leaves():
    scores = {"head": torch.zeros(10), "a": torch.rand(50), "b": torch.rand(50), "out": _few(90)}
    mask = ff.top_k_mask(scores, k=20, scope="layer", keep=["head"], exclude=["out"])
    assert {name: len(found) for name, found in mask.items()} == {
        "head": 10, "a": 5, "b": 5, "out": 0,
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 7, 33, 63, 64])
def test_layer_scope_selects_exactly_k(k):
    scores = {f"t{n}": torch.zeros(n) for n in (1, 2, 3, 4, 5, 6, 43)}
    mask = ff.top_k_mask(scores, k=k, scope="layer")
    assert mask.num_selected == k
    assert mask.num_zero_score == k


# ---- keep and exclude ---------------------------------------------------------------------------


NAMES = ["fc.weight", "fc.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc", "head"]


def model_scores():
    return {name: torch.full((4,), float(i + 1)) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        pytest.param(["fc"], ["fc.weight", "fc.bias"], id="module-not-substring"),
        pytest.param("fc", ["fc.weight", "fc.bias"], id="a-string-for-a-list"),
        pytest.param(["fc.bias"], ["fc.bias"], id="parameter"),
        pytest.param(["mlp"], ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc"], id="outer-module"),
        pytest.param(["mlp.fc"], ["mlp.fc"], id="parameter-not-prefix"),
        pytest.param(["head"], ["head"], id="top-level-parameter"),
        pytest.param(["*.bias"], ["fc.bias", "mlp.fc1.bias"], id="glob"),
        pytest.param(["*fc?.w*"], ["mlp.fc1.weight"], id="question-mark"),
        pytest.param(["mlp.fc[0-9].bias"], ["mlp.fc1.bias"], id="set"),
        pytest.param(["head", "fc", "fc.bias"], ["fc.weight", "fc.bias", "head"], id="several"),
        pytest.param((n for n in ["head"]), ["head"], id="a-generator"),
    ],
)
def test_keep_entries(keep, kept):
    k = 4 * len(kept)
    mask = ff.top_k_mask(model_scores(), k=k, keep=keep)
    assert [name for name, found in mask.items() if found.tolist() == [0, 1, 2, 3]] == kept
    assert mask.num_selected == k


def test_a_name_with_brackets_is_a_name_first():
    mask = ff.top_k_mask({"a[0]": torch.rand(2), "a0": torch.rand(2)}, k=2, keep="a[0]")
    assert {name: len(found) for name, found in mask.items()} == {"a[0]": 2, "a0": 0}


def test_the_kept_part_is_charged_to_k_and_the_rest_competes():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "head": torch.zeros(2), "b": torch.tensor([4.5])}
    mask = ff.top_k_mask(scores, k=4, keep=["head"])
    assert {n: f.tolist() for n, f in mask.items()} == {"a": [0], "head": [0, 1], "b": [0]}
    assert mask.num_zero_score == 2


def test_excluded_weights_are_never_selected_and_count_in_n():
    scores = {"a": torch.rand(60), "embedding": torch.rand(40) + 5}
    mask = ff.top_k_mask(scores, density=0.5, exclude="embedding")
    assert {name: len(found) for name, found in mask.items()} == {"a": 50, "embedding": 0}
    assert mask.num_params == 100


def test_everything_may_be_kept():
    mask = ff.top_k_mask(model_scores(), density=1.0, keep=["*"])
    assert mask.num_selected == mask.num_params == 24


# ---- refusals ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("n", "k"), [(30, 10), (7, 3), (1_000_003, 333_333), (100, 29)])
def test_the_density_of_k_weights_selects_k_weights(n, k):
    scores = {"w": torch.rand(n)}
    mask = ff.top_k_mask(scores, k=k)
    assert ff.top_k_mask(scores, density=mask.density) == mask
    assert ff.top_k_mask(scores, density=k / n) == mask


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_view_that_negates_is_taken_at_its_values(backend):
    scores = torch.tensor([1 - 3j, 2 - 1j, 3 - 2j]).conj().imag  # 3, 1, 2
    assert ff.top_k_mask({"w": scores}, k=1, backend=backend)["w"].tolist() == [0]
    negative = torch._neg_view(torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="must be >= 0"):
        ff.top_k_mask({"w": negative}, k=1, backend=backend)


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


def test_a_pickled_mask_is_as_large_as_its_indices():
    mask = ff.top_k_mask({f"t{i}": torch.rand(500) for i in range(100)}, density=0.5)
    assert len(pickle.dumps(mask)) < 2 * 4 * mask.num_selected
    assert pickle.loads(pickle.dumps(mask)) == mask
