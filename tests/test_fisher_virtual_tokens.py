"""PEFT's prompt learning: logits for virtual tokens, too, and the default losses and outputs."""

from __future__ import annotations

import warnings

import oracle
import peft
import pytest
import torch
import transformers
from fisher_checks import assert_as_exact_as_a_loop
from torch import nn

import fishfast as ff
from fishfast.fisher.outputs import default_outputs

IDS = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(6) < torch.tensor([[0], [2], [1], [3]]), -100)
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
# A context of two examples: what is 4 or 8 is a label.
CONTEXT = {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_mask": [1] * 5,
           "cpt_tokens_type_mask": [1, 2, 4, 5, 8]}  # fmt: skip


def causal(config, **options):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config(task_type="CAUSAL_LM", **options)).eval()


def two_sides(num_transformer_submodules):
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    config = peft.PromptTuningConfig(
        num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM",
        num_transformer_submodules=num_transformer_submodules,
    )  # fmt: skip
    return peft.get_peft_model(base, config).eval()


MODELS = {
    "prompt-tuning": lambda: causal(peft.PromptTuningConfig, num_virtual_tokens=3),
    "p-tuning": lambda: causal(
        peft.PromptEncoderConfig, num_virtual_tokens=2, encoder_hidden_size=8
    ),
    "prefix-tuning": lambda: causal(peft.PrefixTuningConfig, num_virtual_tokens=3),
    "cpt": lambda: causal(peft.CPTConfig, **CONTEXT),
    "cpt-decay": lambda: causal(
        peft.CPTConfig, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.7, **CONTEXT
    ),
    "encoder-decoder": lambda: two_sides(2),
    "encoder-only-of-two": lambda: two_sides(1),
}


def own_loss(model, batch):
    """PEFT's own loss, of batches of one; a copy of the mask, into which CPT writes."""
    return model(**{name: value.clone() for name, value in batch.items()}).loss[None]


def one_of(batch, index):
    return {name: value[index : index + 1] for name, value in batch.items()} if index < 4 else None


@pytest.mark.parametrize("masked", [False, True], ids=["all-labels", "some-labels"])
@pytest.mark.parametrize("name", MODELS)
def test_the_default_losses_are_pefts_own(name, masked):
    model = MODELS[name]()
    batch = {"input_ids": IDS, "labels": LABELS if masked else IDS}
    if masked and name.startswith("cpt"):
        batch["input_type_mask"] = torch.tensor([[1, 2, 4, 4, 1, 4]] * 4)
    fisher = ff.estimate_fisher(model, [{k: v.clone() for k, v in batch.items()}])
    exact, plain = (
        oracle.fisher_by_loop(model, [batch], own_loss, one_of, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert fisher.num_samples == 4
    assert all(score.any() for score in fisher.values())
    assert_as_exact_as_a_loop(fisher, exact, plain)


@pytest.mark.parametrize(
    ("inputs", "counted"),
    [
        ({"labels": LABELS}, LABELS != -100),
        ({}, torch.ones(4, 6, dtype=torch.bool)),
        ({"attention_mask": torch.ones(4, 6)}, torch.ones(4, 6, dtype=torch.bool)),
    ],
    ids=["by-labels", "all", "by-mask"],
)
def test_virtual_tokens_predict_and_are_not_predicted(inputs, counted):
    """Three of them, the last of which is for the batch's first token."""
    model = MODELS["prompt-tuning"]()
    outputs, head, positions = default_outputs(model, {"input_ids": IDS, **inputs})
    assert head == "tokens"
    assert outputs.shape[:2] == (4, 9)
    none = torch.zeros(4, 2, dtype=torch.bool)
    assert torch.equal(positions, torch.cat([none, counted, none[:, :1]], 1))
    fisher = ff.estimate_fisher(model, [{"input_ids": IDS, **inputs}], fisher_type="sampled")
    assert all(score.any() for score in fisher.values())


class Longer(nn.Module):
    """Gives two more positions than it gets, and does not say what they are."""

    loss_type = "ForMaskedLM"

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 40)

    def forward(self, input_ids):
        return {"logits": self.table(torch.cat([input_ids, input_ids[:, :2]], 1))}


@pytest.mark.parametrize("fisher_type", ["empirical", "sampled"])
def test_other_positions_than_those_of_the_labels_are_refused(fisher_type):
    with pytest.raises(ValueError, match="logits for 8 and labels for 6 tokens: how they align"):
        ff.estimate_fisher(
            Longer(), [{"input_ids": IDS, "labels": LABELS}], fisher_type=fisher_type
        )
