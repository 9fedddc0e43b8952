"""torch.nn's attention: batch first, time first, cross attention, and whole transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from .case import Calls, Case, classify, per_sample, sequences


def transformer_layer(**options):
    def run(self, x):
        if options.get("padding"):
            lengths = torch.arange(x.shape[1], device=x.device) >= 3
            return self.head(self.layer(x, src_key_padding_mask=lengths.expand(len(x), -1)))
        return self.head(self.layer(x))

    kept = {name: value for name, value in options.items() if name != "padding"}
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True, **kept)
    return Case(Calls(run, layer=layer, head=nn.Linear(8, 4)), sequences(3, 2), per_sample)


def encoder_time_first():
    def run(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
        return self.head(self.encoder(x.transpose(0, 1), mask=mask).mean(0))

    layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    model = Calls(run, encoder=encoder, head=nn.Linear(8, 4))
    batches = [(x, torch.randint(0, 4, (len(x),))) for x in sequences(5, 4, 3)]
    return Case(model, batches, classify)  # T == B in the first batch


def whole_transformer(batch_first):
    """Encoder and decoder, with cross attention; every other sample is longer on one side."""

    def run(self, source, target):
        if not batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(4).to(source)
        out = self.transformer(source, target, tgt_mask=mask)
        return self.head(out if batch_first else out.transpose(0, 1))

    transformer = nn.Transformer(
        8, 2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=12,
        batch_first=batch_first,
    )  # fmt: skip
    model = Calls(run, transformer=transformer, head=nn.Linear(8, 3))
    batches = list(zip(sequences(3, 2), sequences(3, 2, length=4), strict=True))
    return Case(model, batches, lambda model, pair: model(*pair).square().mean((1, 2)))


def attention(way):
    """Attention alone: self, cross (one weight in two calls), other widths, extra tokens."""
    options = {
        "self": {}, "cross": {}, "weights": {}, "without_bias": {"bias": False},
        "other_widths": {"kdim": 6, "vdim": 5}, "extra_tokens": {"add_bias_kv": True},
        "zero_token": {"add_zero_attn": True}, "time_first": {"batch_first": False},
    }[way]  # fmt: skip
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def run(self, x):
        query, key, value = x[:, :3], x, x
        if way in ("self", "weights"):
            query = x
        elif way == "other_widths":
            key, value = x[..., :6], x[..., 3:]
        elif way == "time_first":
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        out, weights = self.layer(query, key, value, need_weights=way == "weights")
        out = out if weights is None else torch.cat([out, weights], -1)
        return self.head(out.transpose(0, 1) if way == "time_first" else out)

    head = nn.Linear(13 if way == "weights" else 8, 3)
    fallback = {"layer.bias_k", "layer.bias_v"} if way == "extra_tokens" else set()
    return Case(Calls(run, layer=layer, head=head), sequences(5, 3), per_sample, fallback)


ATTENTION: dict[str, Callable[[], Case]] = {
    "transformer_layer": transformer_layer,
    "transformer_layer_norm_first": functools.partial(transformer_layer, norm_first=True),
    "transformer_layer_without_bias": functools.partial(transformer_layer, bias=False),
    "transformer_layer_with_padding": functools.partial(transformer_layer, padding=True),
    "encoder_time_first": encoder_time_first,
    "whole_transformer": functools.partial(whole_transformer, True),
    "whole_transformer_time_first": functools.partial(whole_transformer, False),
}
ATTENTION |= {
    f"attention_{way}": functools.partial(attention, way)
    for way in (
        "self", "cross", "weights", "without_bias", "other_widths", "extra_tokens", "zero_token",
        "time_first",
    )
}  # fmt: skip
