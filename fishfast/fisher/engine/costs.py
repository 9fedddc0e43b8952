"""Where batching does not pay: many small calls of one weight, and few samples.

A step of a recurrent net with vector weights (16 wide, 500 steps, one core of a CPU) costs 2.4 ms
with its search for rows, 0.35 ms for each backward of that. Autograd's own backward of one sample
takes 0.05 ms. So there one backward for each sample is cheaper.
"""

from __future__ import annotations

from collections import Counter
from math import prod

from fishfast.fisher.engine.audit import Audit
from fishfast.fisher.engine.operands import Operand

__all__ = ["in_many_small_calls"]

_FEW_SAMPLES, _SAMPLES_A_PROBE = 64, 7
# Uses of a weight in one forward. Layers are shared by a dozen at most; these are steps in time.
_MANY_CALLS = 64
# Elements of a call up to which the host decides, not the device: a backward through the whole
# batch for each sample computes as many times more than a loop. A product does 16 in the time.
_SMALL_CALL, _SMALL_PRODUCT = 2**15, 2**19


def in_many_small_calls(found: Audit, probes: int = 0) -> dict[str, str]:
    """Return parameters that cost less with one backward for each sample.

    The answer depends on sizes alone, so that scores are the same in every run.

    Args:
        found: the calls of a batch.
        probes: how many backwards a search for rows took, which is likely to come again.

    Returns:
        Name -> why.
    """
    few = max(_FEW_SAMPLES, probes * _SAMPLES_A_PROBE)
    if found.num_samples > few or len(found.calls) < _MANY_CALLS:
        return {}
    counts = Counter(
        name
        for node in found.calls
        for operand in node.operands
        if operand is not None and _is_small(operand, prod(node.lead))
        for name in operand.names
    )
    return {
        name: f"used in {count:,} small calls, which batches of {found.num_samples} do not pay for"
        for name, count in counts.items()
        if count >= _MANY_CALLS
    }


def _is_small(operand: Operand, rows: int) -> bool:
    limit = _SMALL_PRODUCT if operand.tensor.dim() > 1 else _SMALL_CALL
    return rows * operand.tensor.numel() <= limit
