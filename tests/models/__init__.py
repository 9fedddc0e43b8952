"""Small models that use their parameters in every way, each with batches and a per-sample loss.

`CASES` is what the Fisher tests go through: name -> a function that builds a `Case`.
"""

from __future__ import annotations

from .attention import ATTENTION
from .case import Calls, Case, classify, only, parameter, per_sample
from .computed import COMPUTED
from .experts import EXPERTS
from .fallback import FALLBACK, mixed_samples_before_a_batched_head
from .families import DENSE, FAMILIES, huggingface
from .layers import LAYERS, convnet_with_norms
from .positions import POSITIONS
from .rows import ROWS
from .ruled import RULED, embedding, mlp
from .shared import SHARED

__all__ = [
    "CASES", "DENSE", "FAMILIES", "HUGGINGFACE", "Calls", "Case", "classify", "convnet_with_norms",
    "embedding", "huggingface", "mixed_samples_before_a_batched_head", "mlp", "only", "parameter",
    "per_sample",
]  # fmt: skip

HUGGINGFACE = list(FAMILIES)
CASES = (
    RULED | LAYERS | SHARED | COMPUTED | POSITIONS | ATTENTION | ROWS | EXPERTS | FALLBACK
)  # fmt: skip
