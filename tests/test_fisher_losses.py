"""The losses and outputs that `estimate_fisher` takes for batches when it is given no function."""

from __future__ import annotations

from collections import UserDict

import models
import pytest
import torch
import torch.nn.functional as F
from fisher_checks import BATCH, assert_as_exact_as_a_loop, truth
from models import only
from torch import nn

import fishfast as ff
from fishfast.fisher.outputs import default_outputs


class Heads(nn.Module):
    """A model in the way of transformers, with any task."""

    def __init__(self, outputs, **config):
        super().__init__()
        self.loss_type = config.pop("loss_type", None)
        self.config = type("Config", (), config)
        self.linear = nn.Linear(6, outputs)
        self.got = []

    def forward(self, x, **others):
        self.got.append(sorted(others))
        return {"logits": self.linear(x)}


def assert_default_loss_is(loss_fn, model, batch):
    fisher = ff.estimate_fisher(model, [batch])
    case = models.Case.__new__(models.Case)
    case.model, case.batches, case.loss_fn, case.take = model, [batch], loss_fn, only
    assert_as_exact_as_a_loop(fisher, truth(case), truth(case, torch.float32))


def mean_squares(logits, labels):
    return F.mse_loss(logits, labels)


def bce(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels.float())


@pytest.mark.parametrize(
    ("model", "labels", "own_loss"),
    [
        pytest.param(Heads(3), torch.tensor([0, 2, 1, 2]), F.cross_entropy, id="classes"),
        pytest.param(
            Heads(3, loss_type="ForSequenceClassification"), torch.tensor([0, 2, 1, 2]),
            F.cross_entropy, id="classes-by-loss-type",
        ),
        pytest.param(
            Heads(1), torch.randn(4), lambda logits, y: F.mse_loss(logits.squeeze(1), y),
            id="number",
        ),
        pytest.param(Heads(1), torch.randn(4, 1), mean_squares, id="number-in-a-column"),
        pytest.param(
            Heads(3, problem_type="regression"), torch.randn(4, 3), mean_squares, id="numbers"
        ),
        pytest.param(Heads(3), torch.randint(0, 2, (4, 3)).float(), bce, id="several-labels"),
        pytest.param(
            Heads(3, problem_type="multi_label_classification"), torch.randint(0, 2, (4, 3)), bce,
            id="several-labels-by-name",
        ),
        pytest.param(
            Heads(2, problem_type="single_label_classification"),
            torch.tensor([[0], [1], [1], [0]]),
            lambda logits, y: F.cross_entropy(logits, y.view(-1)), id="classes-in-a-column",
        ),
    ],
)  # fmt: skip
def test_default_losses_of_heads(model, labels, own_loss):
    batch = {"x": BATCH[0], "labels": labels}

    def loss_fn(model, batch):
        (one,) = [own_loss(model.linear(batch["x"]), batch["labels"])]
        return one.unsqueeze(0)

    assert_default_loss_is(loss_fn, model, batch)
    assert model.got == [[]]  # labels are not handed on: the model's own loss is not needed


def next_tokens(logits, labels):
    """The mean over a sample's own labels, shifted by one."""
    return F.cross_entropy(logits[0, :-1], labels[0, 1:])


def same_tokens(logits, labels):
    return F.cross_entropy(logits[0], labels[0])


@pytest.mark.parametrize(
    ("config", "own_loss"),
    [
        pytest.param({"loss_type": "ForCausalLM"}, next_tokens, id="causal"),
        pytest.param({"loss_type": "ForMaskedLM"}, same_tokens, id="masked"),
        pytest.param({"loss_type": "ForTokenClassification"}, same_tokens, id="token-classes"),
        pytest.param(
            {"loss_type": "ForConditionalGeneration", "is_encoder_decoder": True}, same_tokens,
            id="encoder-decoder",
        ),
        pytest.param(
            {"loss_type": "ForConditionalGeneration"}, next_tokens, id="decoder-with-images"
        ),
        pytest.param(
            {"loss_type": "ForConditionalGeneration",
             "text_config": type("T", (), {"is_encoder_decoder": True})}, same_tokens,
            id="encoder-decoder-with-images",
        ),
    ],
)  # fmt: skip
def test_default_losses_of_tokens(config, own_loss):
    model = Heads(5, **config)
    labels = torch.randint(0, 5, (4, 7))
    labels[0, 3:] = labels[1, :6] = labels[2, ::2] = -100
    batch = {"x": torch.randn(4, 7, 6), "labels": labels}

    def loss_fn(model, batch):
        return own_loss(model.linear(batch["x"]), batch["labels"]).unsqueeze(0)

    assert_default_loss_is(loss_fn, model, batch)


def test_a_decoder_whose_own_loss_does_not_shift():
    """BartForCausalLM and its kind: transformers calls them causal."""
    model = type("BartForCausalLM", (Heads,), {})(5, loss_type="ForCausalLM")
    batch = {"x": torch.randn(4, 7, 6), "labels": torch.randint(0, 5, (4, 7))}

    def loss_fn(model, batch):
        return same_tokens(model.linear(batch["x"]), batch["labels"]).unsqueeze(0)

    assert_default_loss_is(loss_fn, model, batch)


@pytest.mark.parametrize("name", ["ElectraForPreTraining", "ProphetNetForCausalLM"])
def test_a_model_with_another_loss_asks_for_a_loss_fn(name):
    model = type(name, (Heads,), {})(5)
    batch = {"x": torch.randn(4, 6), "labels": torch.randint(0, 2, (4, 5)).float()}
    with pytest.raises(ValueError, match="loss_fn is needed"):
        ff.estimate_fisher(model, [batch])


class Entries(UserDict):
    """A mapping that is no dict, as transformers' BatchEncoding."""


@pytest.mark.parametrize("kind", [dict, Entries])
@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: ([batch], 1)])
def test_a_loss_may_take_entries_out_of_its_batch(wrap, kind):
    # A second forward, which catches the table where it meets the data.
    model = models.Calls(
        lambda self, x: self.linear(x + self.table(torch.arange(6)).T),
        linear=nn.Linear(6, 5), table=nn.Embedding(6, 1),
    )  # fmt: skip

    def losses(model, batch):
        batch = batch[0][0] if isinstance(batch, tuple) else batch
        labels = batch.pop("labels")
        return F.cross_entropy(model(batch["x"]), labels, reduction="none")

    batch = kind(x=torch.randn(4, 6), labels=torch.randint(0, 5, (4,)))
    fisher = ff.estimate_fisher(model, [wrap(batch)], loss_fn=losses)
    assert fisher.passes["forward"] > 1
    assert set(batch) == {"x", "labels"}


def test_a_sample_without_labels_counts_and_scores_zero():
    model = Heads(5, loss_type="ForCausalLM")
    batch = {"x": torch.randn(2, 7, 6), "labels": torch.full((2, 7), -100)}
    batch["labels"][1] = 3
    fisher = ff.estimate_fisher(model, [batch])
    alone = ff.estimate_fisher(model, [only(batch, 1)])
    assert fisher.num_samples == 2
    for name in fisher:
        torch.testing.assert_close(fisher[name], alone[name])


def test_any_mapping_is_a_batch():
    model = Heads(3)
    batch = {"x": BATCH[0], "labels": torch.tensor([0, 2, 1, 2])}
    expected = ff.estimate_fisher(model, [batch])
    fisher = ff.estimate_fisher(model, [UserDict(batch)])
    assert all(torch.equal(fisher[name], expected[name]) for name in fisher)


@pytest.mark.parametrize(
    ("model", "batch", "error", "text"),
    [
        (Heads(5), {"x": torch.randn(2, 7, 6), "labels": torch.ones(2, 7).long()}, ValueError,
         r"loss_fn is needed for logits of shape \(2, 7, 5\) with loss_type None"),
        (Heads(5, loss_type="ForCTC"), {"x": BATCH[0], "labels": BATCH[1]}, ValueError,
         r"loss_fn is needed for logits of shape \(4, 5\) with loss_type 'ForCTC'"),
    ],
)  # fmt: skip
def test_unknown_tasks_ask_for_a_loss_fn(model, batch, error, text):
    with pytest.raises(error, match=text):
        ff.estimate_fisher(model, [batch])


def test_an_output_without_logits_asks_for_a_loss_fn():
    class Other(Heads):
        def forward(self, x):
            return {"scores": self.linear(x)}

    with pytest.raises(
        TypeError, match=r"no 'logits'; got a mapping with \['scores'\]; pass loss_fn"
    ):
        ff.estimate_fisher(Other(3), [{"x": BATCH[0], "labels": BATCH[1] % 3}])


# ---- outputs, for labels that are drawn or summed over -------------------------------------------


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 2, 1, 2])], ids=["none", "given"])
@pytest.mark.parametrize(
    ("model", "head"),
    [
        (Heads(3), "softmax"),
        (Heads(3, loss_type="ForImageClassification"), "softmax"),
        (Heads(1), "gaussian"),
        (Heads(3, problem_type="regression"), "gaussian"),
        (Heads(3, problem_type="multi_label_classification"), "sigmoid"),
        (Heads(2, problem_type="single_label_classification"), "softmax"),
    ],
)
def test_default_outputs_of_heads(model, head, labels):
    batch = {"x": BATCH[0]} if labels is None else {"x": BATCH[0], "labels": labels}
    outputs, found, counted = default_outputs(model, batch)
    assert (found, counted) == (head, None)
    assert torch.equal(outputs, model.linear(BATCH[0]))
    assert outputs.requires_grad
    assert set(map(tuple, model.got)) == {()}
    assert "labels" in batch or labels is None


def test_default_outputs_of_several_labels_known_by_the_labels():
    batch = {"x": BATCH[0], "labels": torch.rand(4, 3).round()}
    assert default_outputs(Heads(3), batch)[1] == "sigmoid"


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
LABELS = torch.where(torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5, 2, -100)
DECODER = {"loss_type": "ForConditionalGeneration", "is_encoder_decoder": True}


@pytest.mark.parametrize(
    ("config", "inputs", "counted"),
    [
        pytest.param({"loss_type": "ForMaskedLM"}, {}, torch.ones(3, 5), id="masked"),
        pytest.param(
            {"loss_type": "ForMaskedLM"}, {"attention_mask": MASK}, MASK, id="masked-by-mask"
        ),
        pytest.param(
            {"loss_type": "ForTokenClassification"}, {"attention_mask": MASK, "labels": LABELS},
            LABELS != -100, id="token-classes-by-labels",
        ),
        pytest.param(
            {"loss_type": "ForCausalLM"}, {}, torch.tensor([[1, 1, 1, 1, 0]] * 3), id="causal"
        ),
        pytest.param(
            {"loss_type": "ForCausalLM"}, {"attention_mask": MASK},
            torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]), id="causal-by-mask",
        ),
        pytest.param(
            {"loss_type": "ForCausalLM"}, {"attention_mask": MASK, "labels": LABELS},
            F.pad(LABELS[:, 1:] != -100, (0, 1)), id="causal-by-labels",
        ),
        pytest.param(DECODER, {"labels": LABELS}, LABELS != -100, id="encoder-decoder-by-labels"),
        pytest.param(
            DECODER, {"attention_mask": torch.ones(3, 9), "decoder_attention_mask": MASK}, MASK,
            id="encoder-decoder-by-the-decoders-mask",
        ),
        pytest.param(
            DECODER, {"attention_mask": torch.ones(3, 9)}, torch.ones(3, 5), id="encoder-decoder"
        ),
    ],
)  # fmt: skip
def test_default_outputs_of_tokens(config, inputs, counted):
    model = Heads(7, **config)
    outputs, head, found = default_outputs(model, {"x": torch.randn(3, 5, 6), **inputs})
    assert (head, outputs.shape, found.dtype) == ("tokens", (3, 5, 7), torch.bool)
    assert torch.equal(found, counted.bool())


def test_outputs_of_low_precision_are_not_copied():
    model = Heads(3).bfloat16()
    assert default_outputs(model, {"x": BATCH[0].bfloat16()})[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "batch", "error", "text"),
    [
        (Heads(5), BATCH, TypeError, "must be mappings; got a tuple; pass outputs_fn"),
        (Heads(5), {"x": torch.randn(2, 7, 6)}, ValueError,
         r"outputs_fn is needed for logits of shape \(2, 7, 5\) with loss_type None: .*head= one"),
        (Heads(5, loss_type="ForCTC"), {"x": BATCH[0]}, ValueError, "with loss_type 'ForCTC'"),
        (nn.LSTM(6, 2), {"input": BATCH[0]}, TypeError,
         r"no 'logits'; got a tuple; pass outputs_fn\(model, batch\)"),
    ],
)  # fmt: skip
def test_unknown_tasks_ask_for_an_outputs_fn(model, batch, error, text):
    with pytest.raises(error, match=text):
        default_outputs(model, batch)
