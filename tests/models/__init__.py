"""Small models that use their parameters in every way, each with batches and a per-sample loss.

`CASES` is what the Fisher tests go through: name -> a function that builds a `Case`.
"""

from __future__ import annotations

from .case import Case, classify, only, per_sample
from .ruled import RULED, convnet_with_norms, embedding, mlp
from .transformers_tiny import HUGGINGFACE, huggingface
from .unruled import UNRULED
from .unruled_rows import UNRULED_ROWS

__all__ = [
    "CASES", "HUGGINGFACE", "Case", "classify", "convnet_with_norms", "embedding", "huggingface",
    "mlp", "only", "per_sample",
]  # fmt: skip

CASES = RULED | UNRULED | UNRULED_ROWS
