"""`resume_path`: a run that was stopped and goes on gives what one that was never stopped gives."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import assert_same_state, decorated, state_of
from models import CASES, classify, mlp
from models.fallback import ScaledProduct
from torch import nn

import fishfast as ff

SIZES = (4, 3, 4, 1, 2)
GENERATOR = torch.Generator().manual_seed(11)
BATCHES = [
    (torch.randn(b, 6, generator=GENERATOR), torch.randint(0, 4, (b,), generator=GENERATOR))
    for b in SIZES
]
TYPES = {
    "empirical": {"loss_fn": classify},
    "exact": {"fisher_type": "exact", "outputs_fn": lambda model, batch: model(batch[0])},
    "sampled": {
        "fisher_type": "sampled", "outputs_fn": lambda model, batch: model(batch[0]),
        "num_label_samples": 2, "seed": 3,
    },
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", TYPES)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "running.safetensors"


@pytest.fixture
def model():
    return mlp().model


class StopError(Exception):
    """What ends a run."""


def stopping(batches, after, error=StopError):
    """Yield some of the batches, then raise."""
    yield from batches[:after]
    raise error


def stopping_inside(options, after, error=KeyboardInterrupt):
    """Return options whose function raises in the forward of a batch."""
    (name,) = {"loss_fn", "outputs_fn"} & set(options)
    calls = []

    def function(model, batch):
        calls.append(1)
        found = options[name](model, batch)
        if len(calls) > after:
            raise error
        return found

    return {**options, name: function}


def assert_equal(found, expected):
    """Scores bit for bit, and all that is known of them but the time."""
    assert list(found) == list(expected)
    for name, score in expected.items():
        assert torch.equal(found[name], score), name
    for name in ("num_samples", "num_batches", "fisher_type", "power", "fallback", "roads"):
        assert getattr(found, name) == getattr(expected, name), name


# ---- stopped anywhere ---------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("after", [1, 3, 4, 5])
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_stopped_between_batches(model, path, kind, after, error):
    expected = ff.estimate_fisher(model, BATCHES, **TYPES[kind])
    with pytest.raises(error):  # too soon for a save by time
        ff.estimate_fisher(model, stopping(BATCHES, after, error), **TYPES[kind], resume_path=path)
    part = ff.Fisher.load(path)
    assert (part.num_samples, part.num_batches) == (sum(SIZES[:after]), after)
    found = ff.estimate_fisher(model, BATCHES, **TYPES[kind], resume_path=path)
    assert_equal(found, expected)
    assert_equal(ff.Fisher.load(path), expected)


@KINDS
@pytest.mark.parametrize("after", [1, 3])
def test_stopped_inside_a_batch(model, path, kind, after):
    expected = ff.estimate_fisher(model, BATCHES, **TYPES[kind])
    options = stopping_inside(TYPES[kind], after)
    with pytest.raises(KeyboardInterrupt):
        ff.estimate_fisher(model, BATCHES, **options, resume_path=path, save_every=0)
    assert ff.Fisher.load(path).num_samples == sum(SIZES[:after])
    assert_equal(ff.estimate_fisher(model, BATCHES, **TYPES[kind], resume_path=path), expected)


@KINDS
def test_stopped_in_backward(model, path, kind):
    """A part of the batch's scores are added by then; nothing of them may be saved."""
    expected = ff.estimate_fisher(model, BATCHES, **TYPES[kind])

    class Trap(torch.autograd.Function):
        armed = False

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            if Trap.armed:
                raise KeyboardInterrupt
            return grad

    def batches():
        for number, batch in enumerate(BATCHES):
            Trap.armed = number == 2
            yield batch

    handle = model[0].register_forward_hook(lambda module, args, output: Trap.apply(output))
    with pytest.raises(KeyboardInterrupt):
        ff.estimate_fisher(model, batches(), **TYPES[kind], resume_path=path, save_every=0)
    handle.remove()
    assert ff.Fisher.load(path).num_samples == sum(SIZES[:2])
    assert_equal(ff.estimate_fisher(model, BATCHES, **TYPES[kind], resume_path=path), expected)


@KINDS
def test_stopped_after_every_batch(model, path, kind):
    expected = ff.estimate_fisher(model, BATCHES, **TYPES[kind])
    for after in range(1, len(BATCHES) + 1):
        with pytest.raises(StopError):
            ff.estimate_fisher(model, stopping(BATCHES, after), **TYPES[kind], resume_path=path)
    assert_equal(ff.estimate_fisher(model, BATCHES, **TYPES[kind], resume_path=path), expected)


@pytest.mark.parametrize("name", ["convnet_with_norms", "embedding", "bare_parameters", "lstm"])
def test_models_of_every_kind_go_on(path, name):
    case = CASES[name]()
    expected = ff.estimate_fisher(case.model, case.batches, loss_fn=case.loss_fn)
    with pytest.raises(StopError):
        ff.estimate_fisher(
            case.model, stopping(case.batches, 1), loss_fn=case.loss_fn, resume_path=path
        )
    found = ff.estimate_fisher(case.model, case.batches, loss_fn=case.loss_fn, resume_path=path)
    assert_equal(found, expected)


def test_what_the_first_part_fell_back_for_is_remembered(path):
    """A road of the first batches is a road of the whole, and is taken in the others too."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            first = x is BATCHES[0][0]
            use = ScaledProduct.apply if first else nn.functional.linear  # one that has no rule
            return self.head(torch.tanh(use(x, self.inner.weight) + self.inner.bias))

    model = Sometimes()
    expected = ff.estimate_fisher(model, BATCHES, loss_fn=classify)
    assert set(expected.fallback) == {"inner.weight"}
    with pytest.raises(StopError):
        ff.estimate_fisher(model, stopping(BATCHES, 3), loss_fn=classify, resume_path=path)
    found = ff.estimate_fisher(model, BATCHES, loss_fn=classify, resume_path=path)
    assert_equal(found, expected)


def test_passes_and_seconds_are_those_of_all_parts(model, path):
    with pytest.raises(StopError):
        ff.estimate_fisher(model, stopping(BATCHES, 3), loss_fn=classify, resume_path=path)
    part = ff.Fisher.load(path)
    found = ff.estimate_fisher(model, BATCHES, loss_fn=classify, resume_path=path)
    assert found.passes["backward"] == 5
    assert found.passes["forward"] >= 5
    assert all(found.seconds[kind] >= part.seconds[kind] for kind in part.seconds)
    assert found.seconds["backward"] > part.seconds["backward"] > 0


# ---- and finished -------------------------------------------------------------------------------


def refuse_to_give():
    raise AssertionError("the loader was asked")
    yield


@KINDS
def test_a_finished_file_is_the_result_at_once(model, path, kind):
    options = {**TYPES[kind], "resume_path": path}
    first = ff.estimate_fisher(model, BATCHES, **options)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert_equal(ff.estimate_fisher(model, BATCHES, **options), first)
    found = ff.estimate_fisher(model, refuse_to_give(), **options, num_samples=sum(SIZES))
    assert_equal(found, first)
    assert not seen
    for same in (found, ff.Fisher.load(path)):
        assert same.report() == first.report()


@KINDS
def test_more_samples_on_top_of_some(model, path, kind):
    options = {**TYPES[kind], "resume_path": path}
    seven = ff.estimate_fisher(model, BATCHES, **options, num_samples=7)
    assert_equal(seven, ff.estimate_fisher(model, BATCHES, **TYPES[kind], num_samples=7))
    twelve = ff.estimate_fisher(model, BATCHES, **options, num_samples=12)
    assert_equal(twelve, ff.estimate_fisher(model, BATCHES, **TYPES[kind], num_samples=12))
    whole = ff.estimate_fisher(model, BATCHES, **options)
    assert_equal(whole, ff.estimate_fisher(model, BATCHES, **TYPES[kind]))


@KINDS
def test_a_batch_that_was_cut_is_scored_again_as_a_whole(model, path, kind):
    options = {**TYPES[kind], "resume_path": path}
    cut = ff.estimate_fisher(model, BATCHES, **options, num_samples=9, save_every=0)
    assert cut.num_samples == 9
    assert ff.Fisher.load(path).num_samples == 7
    again = ff.estimate_fisher(model, BATCHES, **options, num_samples=9)
    assert_equal(again, cut)
    whole = ff.estimate_fisher(model, BATCHES, **options)
    assert_equal(whole, ff.estimate_fisher(model, BATCHES, **TYPES[kind]))


def test_fewer_samples_than_the_file_has_are_refused(model, path):
    ff.estimate_fisher(model, BATCHES, loss_fn=classify, resume_path=path)
    with pytest.raises(ValueError, match="at least the 14 samples that the file .* has; got 6"):
        ff.estimate_fisher(model, BATCHES, loss_fn=classify, resume_path=path, num_samples=6)
    assert ff.Fisher.load(path).num_samples == 14


# ---- what is in the file ------------------------------------------------------------------------


def test_saved_as_often_as_asked(model, path):
    found = []

    def batches():
        for batch in BATCHES:
            found.append(ff.Fisher.load(path).num_samples if path.exists() else None)
            yield batch

    ff.estimate_fisher(model, batches(), loss_fn=classify, resume_path=path, save_every=0)
    assert found == [None, 4, 7, 11, 12]
    path.unlink()
    found.clear()
    ff.estimate_fisher(model, batches(), loss_fn=classify, resume_path=path, save_every=3600)
    assert found == [None] * 5
    assert ff.Fisher.load(path).num_samples == 14


@KINDS
@pytest.mark.parametrize("save_every", [0, 3600])
def test_nan_in_a_batch_leaves_the_file_as_it_was(model, path, kind, save_every):
    options = {**TYPES[kind], "resume_path": path, "save_every": save_every}
    expected = ff.estimate_fisher(model, BATCHES, **TYPES[kind])
    with pytest.raises(StopError):
        ff.estimate_fisher(model, stopping(BATCHES, 2), **options)
    saved = path.read_bytes()
    damaged = [(x.clone(), y) for x, y in BATCHES]
    damaged[2][0][1, 0] = torch.nan
    with pytest.raises(ValueError, match="finite.*; got .* for sample 1"):
        ff.estimate_fisher(model, damaged, **options)
    assert path.read_bytes() == saved
    assert_equal(ff.estimate_fisher(model, BATCHES, **options), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"power": 1}, "power is 1 in this run and 2 in the file"),
        ({"seed": 4}, "seed is 4 in this run and 3 in the file"),
        ({"num_label_samples": 1}, "num_label_samples is 1 in this run and 2 in the file"),
        ({"model": nn.Linear(6, 4)}, "is scored in this run only"),
        ({**TYPES["exact"], "num_label_samples": 1, "seed": 0}, "fisher_type is 'exact' in this"),
    ],
    ids=["power", "seed", "num_label_samples", "model", "fisher_type"],
)
def test_another_runs_file_is_refused(model, path, changes, text):
    decorated(CASES["mlp"]())
    options = {"model": model, **TYPES["sampled"], "resume_path": path}
    ff.estimate_fisher(batches=BATCHES, **options)
    saved = path.read_bytes()
    options |= changes
    before = state_of(options["model"])
    with pytest.raises(ValueError, match=f"must be of the same run; .*{text}"):
        ff.estimate_fisher(batches=BATCHES, **options)
    assert_same_state(before, state_of(options["model"]))
    assert path.read_bytes() == saved


def test_a_result_that_was_saved_is_not_overwritten(model, path):
    ff.estimate_fisher(model, BATCHES, loss_fn=classify).save(path)
    saved = path.read_bytes()
    with pytest.raises(ValueError, match="must hold running scores; it is a finished result"):
        ff.estimate_fisher(model, BATCHES, loss_fn=classify, resume_path=path)
    assert path.read_bytes() == saved
