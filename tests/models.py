"""Small models that use their parameters in every way, each with batches and a per-sample loss.

`CASES` is what the Fisher tests go through: name -> a function that builds a `Case`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

__all__ = ["CASES", "Case", "classify", "only", "per_sample"]


@dataclasses.dataclass
class Case:
    """A model, batches for it, and how to score it.

    Attributes:
        model: in train mode, as a user would hand it over.
        batches: of different sizes.
        loss_fn: ``loss_fn(model, batch) -> [B]``.
        fallback: names that must be scored one sample at a time; every other one must be batched.
        take: ``take(batch, b)`` is the batch of sample b alone, None past the end.
    """

    model: nn.Module
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], torch.Tensor]
    fallback: set[str]
    take: Callable[[Any, int], Any] | None = None

    def __post_init__(self):
        self.take = self.take or only
        # Biases and norms start at 0 and 1, where errors in them do not show.
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn(p.shape))


def only(batch, b):
    """Return sample b of a batch whose tensors have the samples on dim 0; None past the end."""
    if isinstance(batch, Mapping):
        parts = {name: only(value, b) for name, value in batch.items()}
        return None if None in [*parts.values()] else parts
    if isinstance(batch, (tuple, list)):
        parts = [only(value, b) for value in batch]
        return None if any(part is None for part in parts) else type(batch)(parts)
    return batch[b : b + 1] if b < len(batch) else None


def classify(model, batch):
    """Cross entropy of ``model(x)`` against y, for ``(x, y)``."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def per_sample(model, batch):
    """Squared outputs weighted unevenly, averaged over everything but dim 0."""
    out = model(batch[0] if isinstance(batch, tuple) else batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (out.square() * weights + out * weights).flatten(1).mean(1)


def images(*sizes, channels=3, side=9):
    return [(torch.randn(b, channels, side, side), torch.randint(0, 4, (b,))) for b in sizes]


def vectors(*sizes, width=6):
    return [(torch.randn(b, width), torch.randint(0, 4, (b,))) for b in sizes]


def sequences(*sizes, length=5, width=8):
    return [torch.randn(b, length, width) for b in sizes]


def token_ids(*sizes, length=7, vocabulary=11):
    """Few tokens, so that they repeat in a sample and between samples."""
    return [torch.randint(0, vocabulary, (b, length)) for b in sizes]


# ---- calls that have a rule: everything must be batched -----------------------------------------


def mlp():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 4))
    return Case(model, vectors(5, 3, 1), classify, set())


def linear_over_positions():
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
    return Case(model, sequences(4, 2), per_sample, set())


def linear_over_a_grid():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return Case(model, [torch.randn(3, 2, 5, 8), torch.randn(2, 4, 3, 8)], per_sample, set())


def convnet_with_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Case(model, images(4, 3), classify, set())


CONVOLUTIONS = {
    "conv_stride": {"stride": 2},
    "conv_stride_that_leaves_a_rest": {"stride": (3, 2), "kernel_size": (2, 3)},
    "conv_padding": {"padding": (2, 1)},
    "conv_dilation": {"dilation": (2, 3), "padding": 2},
    "conv_groups": {"groups": 3, "out_channels": 9},
    "conv_depthwise": {"groups": 6},
    "conv_depthwise_multiplied": {"groups": 6, "out_channels": 12},
    "conv_1x1": {"kernel_size": 1},
    "conv_1x1_stride": {"kernel_size": 1, "stride": 2, "bias": False},
    "conv_reflect": {"padding": 1, "padding_mode": "reflect"},
    "conv_everything": {
        "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2,
    },
}  # fmt: skip


def convolution(options):
    arguments = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, **options}
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(**arguments))
    return Case(model, [x for x, _ in images(3, 2)], per_sample, set())


def conv_channels_last():
    case = convolution({"stride": 2})
    case.batches = [x.to(memory_format=torch.channels_last) for x in case.batches]
    return case


def layer_norms():
    model = nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm((5, 6)),
        nn.LayerNorm(6, bias=False), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2),
    )  # fmt: skip
    return Case(model, sequences(4, 3), per_sample, set())


def layer_norm_of_vectors():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
    return Case(model, vectors(4, 3), classify, set())


def batch_norms():
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False),
        nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Case(model, vectors(4, 3), classify, set())


class TokenClassifier(nn.Module):
    def __init__(self, **embedding):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, **embedding)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)).mean(1))


def embedding(**options):
    batches = [(tokens, torch.randint(0, 4, (len(tokens),))) for tokens in token_ids(4, 3, 1)]
    batches[0][0][1] = 2  # one token seven times
    batches[0][0][2] = 0  # nothing but padding, where that is 0
    return Case(TokenClassifier(**options), batches, classify, set())


def embedding_of_padding_only():
    case = embedding(padding_idx=0)
    for tokens, _ in case.batches:
        tokens.zero_()
    return case


def embedding_called_with_negative_padding():
    class Functional(TokenClassifier):
        def forward(self, tokens):
            rows = F.embedding(tokens.int(), self.embedding.weight, padding_idx=-9)
            return self.head(self.norm(rows).mean(1))

    case = embedding()
    case.model.__class__ = Functional
    return case


def half_frozen():
    case = convnet_with_norms()
    case.model[0].weight.requires_grad_(False)
    case.model[1].requires_grad_(False)
    case.model[5].bias.requires_grad_(False)
    return case


def biases_only():
    case = mlp()
    for name, p in case.model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return case


def residual_in_place():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            out = self.inner(x)
            out += x
            out.relu_()
            return self.outer(out)

    return Case(Residual(), vectors(4, 2), classify, set())


def zero_head():
    """A head that starts at zero hides the layers below it in the first look at them."""
    case = mlp()
    with torch.no_grad():
        case.model[3].weight.zero_()
    return case


def called_by_keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.conv = nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv2d(1, 4, 2)

        def forward(self, x):
            x = F.linear(bias=self.linear.bias, weight=self.linear.weight, input=x)
            x = F.layer_norm(
                weight=self.norm.weight, input=x, normalized_shape=[6], bias=self.norm.bias
            )
            x = x.view(-1, 1, 2, 3)
            return F.conv2d(
                stride=2, weight=self.conv.weight, input=x, bias=self.conv.bias
            ).flatten(1)

    return Case(Keywords(), vectors(4, 3), classify, set())


def unused_branch():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)
            self.bare = nn.Parameter(torch.randn(3))

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    return Case(Branches(), vectors(3, 2), classify, set())


def checkpointed():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(2)
            )
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    return Case(Checkpointed(), vectors(4, 3), classify, set())


# ---- calls without a rule: the fallback must find them and be exact -----------------------------


def checkpointed_with_fallback():
    case = checkpointed()
    case.model.blocks[0][1] = nn.GroupNorm(2, 6)
    case.fallback = {"blocks.0.1.weight", "blocks.0.1.bias"}
    return case


def tied_language_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.inner(self.embedding(tokens))))

    return Case(Tied(), token_ids(3, 2), next_token, {"embedding.weight"})


def next_token(model, tokens):
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.norm(self.shared(torch.tanh(self.norm(self.shared(x))))))

    return Case(
        Twice(),
        vectors(3, 2),
        classify,
        {"shared.weight", "shared.bias", "norm.weight", "norm.bias"},
    )


def transformer_layer():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.layer(x))

    attention = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    return Case(Encoder(), sequences(3, 2), per_sample, {f"layer.self_attn.{n}" for n in attention})


def lstm():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 5, 2, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model = Recurrent()
    return Case(
        model, sequences(3, 2), per_sample,
        {name for name, _ in model.named_parameters() if name.startswith("lstm")},
    )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def other_norms():
    model = nn.Sequential(
        nn.Linear(8, 6), RMSNorm(6), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 6),
        nn.Unflatten(2, (6, 1)), nn.Flatten(1, 2), nn.GroupNorm(5, 30),
    )  # fmt: skip
    return Case(
        model, sequences(3, 2), per_sample, {"1.weight", "3.weight", "7.weight", "7.bias"}
    )  # fmt: skip


def weight_norm():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))
    inner = {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    return Case(model, vectors(3, 2), classify, inner)


def bare_parameters():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(6))
            self.matrix, self.linear = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 6)

        def forward(self, x):
            return (self.linear(x) * self.scale + self.shift) @ self.matrix

    return Case(Bare(), vectors(3, 2), classify, {"scale", "shift", "matrix"})


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def custom_function():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            inner = F.linear(torch.tanh(x), Scaled.apply(self.inner.weight), self.inner.bias)
            return self.outer(inner)

    return Case(Custom(), vectors(3, 2), classify, {"inner.weight", "inner.bias"})


def views_of_a_weight():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, 4, 6))  # two weights in one parameter
            self.turned = nn.Parameter(torch.randn(4, 4))
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            out = torch.tanh(F.linear(x, self.stack[0]) + F.linear(x, self.stack[1]))
            return self.head(F.linear(out, self.turned.T))

    return Case(Views(), vectors(3, 2), classify, {"stack", "turned"})


def used_with_and_without_a_rule():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            penalty = 0.1 * self.linear.weight.square().sum() + self.linear.bias.abs().sum()
            return self.head(self.linear(x)) * (1 + penalty)

    return Case(Both(), vectors(3, 2), classify, {"linear.weight", "linear.bias"})


def flattened_tokens():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.head = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            flat = torch.tanh(self.inner(self.norm(x).flatten(0, 1)))
            return self.head(flat.unflatten(0, x.shape[:2]))

    return Case(Flattened(), sequences(3, 2), per_sample, {"inner.weight", "inner.bias"})


def time_first():
    """Tokens [T, B]: dim 0 is never the sample but in the head."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.gru, self.head = nn.Embedding(11, 6), nn.GRU(6, 5), nn.Linear(5, 4)

        def forward(self, tokens):
            return self.head(self.gru(self.embedding(tokens))[0][-1])

    def take(batch, b):
        tokens, labels = batch
        return (tokens[:, b : b + 1], labels[b : b + 1]) if b < len(labels) else None

    model = TimeFirst()
    # T == B in the first batch, by accident.
    batches = [(torch.randint(0, 11, (4, b)), torch.randint(0, 4, (b,))) for b in (4, 3, 5)]
    names = {name for name, _ in model.named_parameters() if not name.startswith("head")}
    return Case(model, batches, classify, names, take)


class Positions(nn.Module):
    """A table of positions, looked up by arange: its call has T rows, or 1, but never B."""

    def __init__(self, broadcast):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.head = nn.Linear(6, 11)
        self.broadcast = broadcast

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        if self.broadcast:
            places = places.unsqueeze(0)
        x = self.tokens(tokens) + self.positions(places)
        # Causal: position t sees the mean of what came before it.
        seen = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(1)
        return self.head(torch.tanh(seen))


def positions(sizes, broadcast=False):
    return Case(Positions(broadcast), token_ids(*sizes, length=4), next_token, {"positions.weight"})


def masked_next_token(model, batch):
    """Mean over the labels that are not -100, as for a causal language model."""
    tokens, labels = batch
    losses = F.cross_entropy(
        model(tokens).transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def positions_with_an_empty_first_sample():
    """T == B, and the first sample, whose labels are all masked, has no gradient to look at."""
    tokens = token_ids(4, 3, length=4)
    labels = [t.roll(-1, 1) for t in tokens]
    labels[0][0] = -100
    batches = list(zip(tokens, labels, strict=True))
    return Case(Positions(False), batches, masked_next_token, {"positions.weight"})


def positions_with_a_short_first_sample():
    """T == B, and the loss that stands out has a label at position 0 only, which sees no other."""

    def loss_fn(model, batch):
        short = (batch[1] != -100).sum(1) == 1
        return masked_next_token(model, batch) * torch.where(short, 100, 1)

    case = positions_with_an_empty_first_sample()
    tokens, labels = case.batches[0]
    labels[0, 0] = tokens[0, 1]
    case.loss_fn = loss_fn
    return case


def other_layers():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv1d(8, 6, 3), nn.ConvTranspose1d(6, 5, 2)
            self.act, self.pair = nn.PReLU(5), nn.Bilinear(5, 5, 4)

        def forward(self, x):
            x = self.act(self.up(self.conv(x.transpose(1, 2)))).mean(2)
            return self.pair(x, x)

    model = Others()
    return Case(model, sequences(3, 2), per_sample, {name for name, _ in model.named_parameters()})


def embedding_bag():
    model = nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 4))
    return Case(model, token_ids(3, 2), per_sample, {"0.weight"})


def queries_without_a_batch():
    """Learned queries go through a layer once, before they are expanded to the batch."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 3, 8))
            self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            keys = self.key(x)
            queries = self.query(self.queries).expand(len(x), -1, -1)
            return (queries @ keys.transpose(1, 2)).softmax(-1) @ keys

    names = {"queries", "query.weight", "query.bias"}
    return Case(Queries(), sequences(3, 2, 1), per_sample, names)


def samples_in_another_order():
    """A layer that sees the samples in another order than the losses."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.turned, self.head = (nn.Linear(6, n) for n in (6, 6, 4))

        def forward(self, x):
            return self.head(self.turned(torch.tanh(self.first(x)).flip(0)).flip(0))

    return Case(Turned(), vectors(4, 3), classify, {"turned.weight", "turned.bias"})


def routed_samples():
    """Experts that see some of the samples only, and now and then all of them."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            out = torch.zeros_like(x)
            for expert, mine in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
                out = out.index_put((mine,), expert(x[mine]))
            return self.head(out)

    case = Case(Routed(), vectors(3, 5, 4), classify, set())
    case.batches[0][0][:, 0].abs_()
    case.fallback = {name for name, _ in case.model.named_parameters() if "experts" in name}
    return case


# ---- transformers -------------------------------------------------------------------------------


@functools.cache
def _transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


_TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 50, "max_position_embeddings": 16,
}  # fmt: skip
_LLAMA = {
    **_TINY,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _language_batches(*sizes, length=6, with_mask=True):
    batches = []
    for b in sizes:
        ids = torch.randint(3, 50, (b, length))
        labels = ids.clone()
        mask = torch.ones_like(ids)
        for i in range(b):  # samples of different lengths, padded on the right
            used = length - i % 3
            labels[i, used:] = -100
            mask[i, used:] = 0
        batch = {"input_ids": ids, "labels": labels}
        batches.append({**batch, "attention_mask": mask} if with_mask else batch)
    return batches


def _own_loss(model, batch):
    """One loss per sample: the model's own, called on every sample alone."""
    return torch.stack(
        [model(**only(batch, b)).loss for b in range(len(batch["labels"]))]
    )  # fmt: skip


def huggingface(kind):
    tf = _transformers()
    classes = {
        "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_TINY, num_labels=3)),
        "bert_mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_TINY)),
        "bert_tokens": lambda: tf.BertForTokenClassification(tf.BertConfig(**_TINY, num_labels=5)),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16,
                          bos_token_id=1, eos_token_id=2)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
        "qwen3_tied": lambda: tf.Qwen3ForCausalLM(
            tf.Qwen3Config(**_LLAMA, head_dim=8, tie_word_embeddings=True)
        ),
        "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_LLAMA, head_dim=8)),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=2,
                             experts_implementation="eager")  # the other has no float64
        ),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50,
                        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
        ),
        "bart": lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                          vocab_size=50, max_position_embeddings=16, decoder_start_token_id=2,
                          pad_token_id=1, bos_token_id=0, eos_token_id=2, forced_eos_token_id=2)
        ),
    }  # fmt: skip
    model = classes[kind]()
    if kind == "bert":
        batches = [
            {**b, "labels": torch.randint(0, 3, (len(b["labels"]),))}
            for b in _language_batches(4, 3)
        ]
    elif kind == "bert_tokens":
        batches = _language_batches(4, 3)
        for batch in batches:
            batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 5)
    else:
        batches = _language_batches(4, 3)
    return Case(model, batches, _own_loss, set())


RULED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        mlp, linear_over_positions, linear_over_a_grid, convnet_with_norms, conv_channels_last,
        layer_norms, layer_norm_of_vectors, batch_norms, embedding, embedding_of_padding_only,
        embedding_called_with_negative_padding, half_frozen, biases_only, residual_in_place,
        zero_head, called_by_keywords, unused_branch, checkpointed,
    )
}  # fmt: skip
RULED |= {name: functools.partial(convolution, options) for name, options in CONVOLUTIONS.items()}
RULED |= {
    "embedding_padding": functools.partial(embedding, padding_idx=0),
    "embedding_padding_from_the_end": functools.partial(embedding, padding_idx=-9),
    "embedding_sparse": functools.partial(embedding, sparse=True),
}

UNRULED: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        checkpointed_with_fallback, tied_language_model, called_twice, transformer_layer, lstm,
        other_norms, weight_norm, bare_parameters, custom_function, views_of_a_weight,
        used_with_and_without_a_rule, flattened_tokens, time_first, other_layers, embedding_bag,
        queries_without_a_batch, samples_in_another_order, routed_samples,
        positions_with_an_empty_first_sample, positions_with_a_short_first_sample,
    )
}  # fmt: skip
UNRULED |= {
    "conv_same_padding": lambda: _fallback_conv(padding="same"),
    "positions": functools.partial(positions, (3, 2)),
    "positions_T_equals_B": functools.partial(positions, (4, 3)),
    "positions_of_one_row": functools.partial(positions, (3, 1), broadcast=True),
    "positions_after_a_batch_of_one": functools.partial(positions, (1, 4, 3)),
}


def _fallback_conv(**options):
    case = convolution(options)
    case.fallback = {"2.weight", "2.bias"}
    return case


HUGGINGFACE = [
    "bert", "bert_mlm", "bert_tokens", "gpt2", "llama", "qwen3_tied", "gemma2", "mixtral", "t5",
    "bart",
]  # fmt: skip

CASES = RULED | UNRULED
