"""How functions use their weights: one rule for each, by function.

A rule runs the call, gives the gradient of its input, and describes what the per-sample gradient of
its weight and bias is made of (see uses.py). Elementwise calls need none: `broadcast` expands the
operand to the call's shape, and autograd does the rest. Any other call with a weight of its own
becomes a parameter for the fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fishfast.fisher.engine.rules.broadcast import BROADCASTING, BroadcastRule
from fishfast.fisher.engine.rules.conv import CONV_RULES
from fishfast.fisher.engine.rules.conv_transpose import CONV_TRANSPOSE_RULES
from fishfast.fisher.engine.rules.embedding import EMBEDDING_RULES, EmbeddingRule
from fishfast.fisher.engine.rules.linear import LINEAR_RULES, LinearRule
from fishfast.fisher.engine.rules.norm import NORM_RULES
from fishfast.fisher.engine.rules.rule import Rule, autocast_input
from fishfast.fisher.engine.rules.scale import SCALE_RULES, ScaleRule

__all__ = [
    "BROADCASTING",
    "RULES",
    "BroadcastRule",
    "EmbeddingRule",
    "LinearRule",
    "Rule",
    "ScaleRule",
    "autocast_input",
]

RULES: dict[Callable[..., Any], type[Rule]] = {
    **LINEAR_RULES,
    **EMBEDDING_RULES,
    **CONV_RULES,
    **CONV_TRANSPOSE_RULES,
    **NORM_RULES,
    **SCALE_RULES,
}
