"""Embeddings: rows of a table by token id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fishfast.fisher.engine.rows import Rows
from fishfast.fisher.engine.rules.rule import Rule
from fishfast.fisher.engine.uses import EmbeddingUse, Use

__all__ = ["EmbeddingRule"]


class EmbeddingRule(Rule):
    """``F.embedding``.

    ``scale_grad_by_freq`` is not applied: it divides what the optimizer sees by counts over the
    batch, and is no part of the loss's derivative.
    """

    keeps_input = True  # the ids, which tell a tied head its own rows
    arguments: tuple[str, ...] = (
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
    )  # fmt: skip

    def is_exact(self) -> bool:
        """Return whether the lookup leaves the rows as they are."""
        return self.x.dim() >= 1 and self.options.get("max_norm") is None

    def num_lead(self, x: Tensor) -> int:
        """Return all dims of the ids."""
        return x.dim()

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run the call."""
        assert weight is not None
        return F.embedding(x, weight, self.options.get("padding_idx"))

    def input_grad(self, x: Tensor, weight: Tensor | None, grad: Tensor) -> Tensor:
        """Token ids have no gradient."""
        raise AssertionError("token ids have no gradient")

    def use(self, index: int, x: Tensor, grad: Tensor, rows: Rows) -> Use:
        """Return the gradient's rows with their tokens, without padding."""
        num_tokens, padding_idx = self.shape(0)[0], self.options.get("padding_idx")
        tokens, samples = self.tokens_of(rows)
        grad = grad.reshape(-1, grad.shape[-1])
        if padding_idx is not None:  # rows of zeros, so that nobody waits for how many are left
            padding = tokens == padding_idx % num_tokens
            grad = grad.masked_fill(padding.unsqueeze(1), 0)
        if rows.layout is None:
            real = samples >= 0
            tokens, samples, grad = tokens[real], samples[real], grad[real]
        return EmbeddingUse(rows, tokens, samples, grad, num_tokens)

    def tokens_of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the token of each row and the sample that it belongs to, ``[N]``."""
        return self.x.reshape(-1).long(), rows.samples(self.x.device)


EMBEDDING_RULES: dict[Callable[..., Any], type[Rule]] = {F.embedding: EmbeddingRule}
