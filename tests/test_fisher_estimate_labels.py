"""`estimate_fisher` over the model's own labels: exact, sampled, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fisher_checks import assert_as_exact_as_a_loop
from label_oracle import classes, label_vectors, moments, samples_of, sequences, sigma_points
from models import CASES
from torch import nn

import fishfast as ff

POWERS = pytest.mark.parametrize("power", [2, 1], ids=["squares", "absolute"])
INPUTS = torch.randn(7, 6, generator=torch.Generator().manual_seed(8))
BATCHES = [(INPUTS[:4],), (INPUTS[4:],)]


def first(model, batch):
    return model(batch[0])


def one_number(model, batch):
    return model(batch[0])[:, 0]


def net(outputs):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs))


def score(model, batches=BATCHES, **options):
    return ff.estimate_fisher(model, batches, **{"outputs_fn": first, **options})


def same(one, other):
    return all(torch.equal(score, other[name]) for name, score in one.items())


# ---- exact --------------------------------------------------------------------------------------

# head, outputs, outputs_fn, labels, power, backwards for each batch
HEADS = [
    pytest.param("softmax", 4, first, classes, 2, 3, id="softmax"),
    pytest.param(None, 4, first, classes, 2, 3, id="default-head"),
    pytest.param("softmax", 4, first, classes, 1, 4, id="softmax-absolute"),
    pytest.param("softmax", 2, first, classes, 2, 1, id="two-classes"),
    pytest.param("softmax", 2, first, classes, 1, 1, id="two-classes-absolute"),
    pytest.param("sigmoid", 3, first, label_vectors, 2, 3, id="multi-label"),
    pytest.param("sigmoid", 1, one_number, label_vectors, 2, 1, id="yes-or-no"),
    pytest.param("sigmoid", 1, one_number, label_vectors, 1, 1, id="yes-or-no-absolute"),
    pytest.param("gaussian", 2, first, sigma_points, 2, 2, id="regression"),
    pytest.param("gaussian", 1, one_number, sigma_points, 2, 1, id="one-number"),
    pytest.param("gaussian", 1, first, sigma_points, 1, 1, id="one-number-absolute"),
]


@pytest.mark.parametrize(("head", "outputs", "outputs_fn", "labels", "power", "backwards"), HEADS)
def test_exact_is_the_mean_over_every_label(head, outputs, outputs_fn, labels, power, backwards):
    model = net(outputs)
    fisher = score(
        model, fisher_type="exact", outputs_fn=outputs_fn, head=head, power=power
    )  # fmt: skip
    truth, plain = (
        moments(model, BATCHES, outputs_fn, labels, power, dtype)[0]
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_exact_as_a_loop(fisher, truth, plain, power)
    assert (fisher.fisher_type, fisher.power) == ("exact", power)
    assert (fisher.num_samples, fisher.num_batches) == (7, 2)
    assert (fisher.passes["forward"], fisher.passes["backward"]) == (2, 2 * backwards)


@POWERS
@pytest.mark.parametrize(
    "name", ["convnet_with_norms", "embedding", "called_twice", "bare_parameters", "half_frozen",
             "checkpointed", "custom_function"],
)  # fmt: skip
def test_exact_for_models_of_every_kind(name, power):
    case = CASES[name]()
    fisher = score(case.model, case.batches, fisher_type="exact", power=power)
    truth, plain = (
        moments(case.model, case.batches, first, classes, power, dtype)[0]
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_exact_as_a_loop(fisher, truth, plain, power)


def test_exact_does_not_depend_on_the_batches_or_their_labels():
    model = net(4)
    whole = score(model, fisher_type="exact")
    singles = score(model, list(samples_of(BATCHES)), fisher_type="exact", seed=5)
    assert whole.num_samples == singles.num_samples == 7
    for name, values in whole.items():
        torch.testing.assert_close(singles[name], values)
    part = score(model, fisher_type="exact", num_samples=6)
    truth = [
        moments(model, [(INPUTS[:6],)], first, classes, 2, d)[0]
        for d in (torch.float64, torch.float32)
    ]
    assert_as_exact_as_a_loop(part, *truth)


# ---- transformers -------------------------------------------------------------------------------


def bert(**options):
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=50, max_position_embeddings=16, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def text(*sizes):
    batches = []
    for size in sizes:
        ids, mask = torch.randint(3, 50, (size, 6)), torch.ones(size, 6, dtype=torch.int64)
        mask[::2, 4:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def logits(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize(
    ("options", "make_labels", "labels"),
    [
        pytest.param({"num_labels": 3}, None, classes, id="classes"),
        pytest.param({"num_labels": 2}, None, classes, id="two-classes"),
        pytest.param(
            {"num_labels": 3, "problem_type": "multi_label_classification"}, None, label_vectors,
            id="multi-label",
        ),
        pytest.param(
            {"num_labels": 3}, lambda size: torch.rand(size, 3).round(), label_vectors,
            id="multi-label-by-its-labels",
        ),
        pytest.param({"num_labels": 1}, None, sigma_points, id="regression"),
        pytest.param(
            {"num_labels": 2, "problem_type": "regression"}, None, sigma_points,
            id="two-regressions",
        ),
    ],
)  # fmt: skip
def test_exact_for_transformers(options, make_labels, labels):
    model, batches = bert(**options), text(3, 2)
    for batch in batches:
        if make_labels:
            batch["labels"] = make_labels(len(batch["input_ids"]))
    fisher = ff.estimate_fisher(model, batches, fisher_type="exact")
    truth, plain = (
        moments(model, batches, logits, labels, 2, dtype)[0]
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_exact_as_a_loop(fisher, truth, plain)
    assert not fisher.fallback


# ---- sampled ------------------------------------------------------------------------------------


def assert_mean_is(fisher, draws, mean, variance):
    """A mean over draws is within 6 of its standard errors, which all labels together tell."""
    largest = max(values.max() for values in mean.values())
    for name, found in fisher.items():
        error = np.abs(found.double().numpy() - mean[name])
        allowed = 6 * np.sqrt(variance[name] / draws) + 1e-5 * mean[name] + 1e-9 * largest
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.2f}"


@POWERS
@pytest.mark.parametrize(
    ("head", "labels"), [("softmax", classes), ("sigmoid", label_vectors)],
)  # fmt: skip
def test_sampled_is_unbiased(head, labels, power):
    model = net(3)
    fisher = score(model, fisher_type="sampled", head=head, power=power, num_label_samples=400)
    assert_mean_is(fisher, 400, *moments(model, BATCHES, first, labels, power))
    assert (fisher.fisher_type, fisher.power, fisher.num_samples) == ("sampled", power, 7)
    assert (fisher.passes["forward"], fisher.passes["backward"]) == (2, 800)


def language_model(kind):
    import transformers

    if kind == "next":
        config = transformers.GPT2Config(
            n_embd=8, n_layer=1, n_head=2, vocab_size=4, n_positions=8, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        vocab_size=4, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


IDS = torch.tensor([[3, 1, 0, 2], [1, 3, 2, 0]])
LABELS = torch.tensor([[-100, -100, 0, 2], [-100, 3, -100, -100]])
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
# Which positions' distributions are drawn from.
TEXTS = [
    pytest.param("next", {"labels": LABELS}, [[1, 2], [0]], id="next-labels"),
    pytest.param("next", {"attention_mask": RIGHT}, [[0, 1], [0]], id="next-padded-right"),
    pytest.param("next", {"attention_mask": LEFT}, [[1, 2], [0, 1]], id="next-padded-left"),
    pytest.param(
        "next", {"labels": LABELS, "attention_mask": LEFT}, [[1, 2], [0]], id="next-labels-and-mask"
    ),
    pytest.param("same", {"labels": LABELS}, [[2, 3], [1]], id="same-labels"),
    pytest.param("same", {"attention_mask": RIGHT}, [[0, 1, 2], [0, 1]], id="same-padded"),
]  # fmt: skip


def at(places):
    """Return outputs at a sample's places; samples are told apart by their tokens."""

    def outputs_fn(model, batch):
        found = logits(model, batch)
        (sample,) = (batch["input_ids"] == IDS).all(1).nonzero()[0]
        return found[:, places[sample]]

    return outputs_fn


@pytest.mark.parametrize(("kind", "given", "places"), TEXTS)
def test_sampled_tokens_are_unbiased_over_sequences(kind, given, places):
    model, batches = language_model(kind), [{"input_ids": IDS, **given}]
    fisher = ff.estimate_fisher(model, batches, fisher_type="sampled", num_label_samples=100)
    assert_mean_is(fisher, 100, *moments(model, batches, at(places), sequences))
    assert not fisher.fallback


@POWERS
@pytest.mark.parametrize(("kind", "given", "places"), TEXTS[:2] + TEXTS[4:5])
def test_one_draw_is_the_gradient_of_one_sequence(kind, given, places, power):
    model = language_model(kind)
    batch = {name: value[:1] for name, value in {"input_ids": IDS, **given}.items()}
    candidates = []

    def only_the(number):
        return lambda outputs, power: [(1.0, sequences(outputs)[number][1])]

    for number in range(4 ** len(places[0])):
        found, _ = moments(model, [batch], at(places), only_the(number), power)
        candidates.append(np.concatenate([values.reshape(-1) for values in found.values()]))
    drawn = set()
    for seed in range(12):
        fisher = ff.estimate_fisher(
            model, [batch], fisher_type="sampled", seed=seed, power=power
        )  # fmt: skip
        found = torch.cat([values.flatten() for values in fisher.values()]).double().numpy()
        errors = [np.linalg.norm(found - c) / np.linalg.norm(c) for c in candidates]
        drawn.add(int(np.argmin(errors)))
        assert min(errors) < 1e-5
    assert len(drawn) > 3


@pytest.mark.parametrize(
    "options", [{"head": "softmax"}, {"head": "sigmoid"}, {"head": "gaussian"}]
)
def test_a_seed_repeats_the_draws_and_nothing_else_is_drawn_from(options):
    model = net(3)
    before = torch.get_rng_state()

    def drawn(**more):
        return score(model, fisher_type="sampled", **options, **more)

    assert same(drawn(seed=1), drawn(seed=1))
    assert same(drawn(), drawn(seed=0))
    assert not same(drawn(seed=1), drawn(seed=2))
    assert not same(drawn(seed=1), drawn(seed=1, num_label_samples=2))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)  # the global generator has no say
    expected = drawn(seed=1)
    torch.manual_seed(99)
    assert same(drawn(seed=1), expected)
