"""Running scores: a run that stops and goes on equals one that never stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fishfast as ff
from fishfast.fisher.heads import output_rows
from fishfast.fisher.running import RunningScores

BATCHES = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))


def zeros():
    return {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}


def scored(path=None, stop_after=None, seed=1, draws=2):
    """Score a linear layer by drawn labels, in the way of `estimate_fisher`, from where it was."""
    torch.manual_seed(2)
    model, scores = nn.Linear(4, 3), zeros()
    generator = torch.Generator().manual_seed(seed)
    samples = batches = 0
    if path is not None:
        running = RunningScores(path, 0, seed=seed, num_label_samples=draws, generator=generator)
        if before := running.resume(scores, "sampled", 2):
            samples, batches = before.num_samples, before.num_batches
    for x in BATCHES[batches:stop_after]:
        for row in output_rows(model(x), "softmax", "sampled", 2, draws, generator):
            for loss in row:
                grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                for score, grad in zip(scores.values(), grads, strict=True):
                    score += grad.square()
        samples, batches = samples + len(x), batches + 1
        if path is not None:
            assert running.maybe_save(
                lambda: ff.Fisher(
                    scores, samples, num_batches=batches, fisher_type="sampled",  # noqa: B023
                    seconds={"forward": 1.5}, roads={"bias": "captured"},
                )
            )  # fmt: skip
    return ff.Fisher(scores, samples, num_batches=batches, fisher_type="sampled")


@pytest.mark.parametrize("stops", [[0], [2], [1, 1, 4], [5], [5, 5]])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stops):
    expected = scored()
    for stop_after in stops:
        scored(tmp_path / "running", stop_after)
    found = scored(tmp_path / "running")
    assert (found.num_samples, found.num_batches) == (15, 5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = scored(seed=2)
    assert not torch.equal(other["weight"], expected["weight"])


def test_resume_gives_everything_back_on_the_given_scores(tmp_path):
    scored(tmp_path / "running", 2)
    scores = zeros()
    kept = dict(scores)
    running = RunningScores(
        tmp_path / "running", seed=1, num_label_samples=2, generator=torch.Generator()
    )
    found = running.resume(scores, "sampled", 2)
    assert all(found[name] is kept[name] for name in kept)
    assert scores["weight"].count_nonzero()
    assert found.seconds["forward"] == 1.5
    assert found.roads == {"weight": "batched", "bias": "captured"}
    # The running scores may be looked at as they are.
    assert torch.equal(ff.Fisher.load(tmp_path / "running")["weight"], scores["weight"])


def test_without_a_file_nothing_is_resumed(tmp_path):
    scores = zeros()
    assert RunningScores(tmp_path / "none").resume(scores, "empirical", 2) is None
    assert not any(score.count_nonzero() for score in scores.values())
    assert not list(tmp_path.iterdir())


def test_maybe_save_waits(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("fishfast.fisher.running.time.monotonic", lambda: now)
    running = RunningScores(tmp_path / "f", every_seconds=10)
    asked = []

    def result():
        asked.append(now)
        return ff.Fisher(zeros(), len(asked))

    saved = []
    for now in (1005.0, 1009.9, 1010.0, 1019.9, 1021.0, 1022.0):  # noqa: B007 - read by the clock
        saved.append(running.maybe_save(result))
    assert saved == [False, False, True, False, True, False]
    assert asked == [1010.0, 1021.0]
    assert ff.Fisher.load(tmp_path / "f").num_samples == 2
    running.save_now(ff.Fisher(zeros(), 9))
    assert ff.Fisher.load(tmp_path / "f").num_samples == 9
    now = 1031.9
    assert not running.maybe_save(result)


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    running = RunningScores(tmp_path / "f")
    running.save_now(ff.Fisher(zeros(), 1))
    with pytest.raises(ValueError, match="'bias' has NaN or infinity"):
        running.save_now(ff.Fisher({"bias": torch.tensor([torch.nan])}, 2))

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("fishfast.files.atomic.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        running.save_now(ff.Fisher(zeros(), 3))
    assert ff.Fisher.load(tmp_path / "f").num_samples == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"power": 1}, "power is 1 in this run and 2 in the file"),
        ({"fisher_type": "exact"}, "fisher_type is 'exact' in this run and 'sampled' in the file"),
        ({"scores": {"weight": torch.ones(3, 4)}}, "'bias' is scored in the file only"),
        ({"scores": {**zeros(), "more": torch.ones(3)}}, "'more' is scored in this run only"),
        ({"scores": {**zeros(), "bias": torch.ones(1, 3)}},
         r"'bias' has shape \(1, 3\) in this run and \(3,\) in the file"),
        ({"seed": 2}, "seed is 2 in this run and 1 in the file"),
        ({"seed": None}, "seed is null in this run and 1 in the file"),
        ({"num_label_samples": 1}, "num_label_samples is 1 in this run and 2 in the file"),
        ({"generator": None}, "its draws come from cpu generator, this run's from none"),
    ],
)  # fmt: skip
def test_another_runs_file_is_refused(tmp_path, changes, text):
    scored(tmp_path / "running", 2)
    generator = torch.Generator().manual_seed(7)
    options = {"seed": 1, "num_label_samples": 2, "generator": generator, "scores": zeros(),
               "fisher_type": "sampled", "power": 2, **changes}  # fmt: skip
    given = {name: options.pop(name) for name in ("scores", "fisher_type", "power")}
    before = {name: score.clone() for name, score in given["scores"].items()}
    state = generator.get_state()
    with pytest.raises(ValueError, match=f"/running' must be of the same run; {text}"):
        RunningScores(tmp_path / "running", **options).resume(**given)
    assert all(torch.equal(before[name], score) for name, score in given["scores"].items())
    assert torch.equal(generator.get_state(), state)


def test_a_finished_result_is_no_running_one(tmp_path):
    ff.Fisher(zeros(), 4).save(tmp_path / "f")
    with pytest.raises(ValueError, match="must hold running scores; it is a finished result"):
        RunningScores(tmp_path / "f").resume(zeros(), "empirical", 2)


def test_a_path_that_cannot_be_written_is_refused_before_scoring(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder of .* must exist; create it first"):
        RunningScores(tmp_path / "none" / "f")
    with pytest.raises(ValueError, match="every_seconds must be at least 0; got -1"):
        RunningScores(tmp_path / "f", -1)
