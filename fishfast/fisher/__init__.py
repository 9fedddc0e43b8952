"""The diagonal Fisher information of a model, exact per sample.

`estimate` is the entry and `result` what it returns; `scorer` takes one batch through forward and
backward; `interception` catches calls and audits that none is missed; `rules` holds the per-sample
gradients of each function; `losses` is for batches with labels.
"""

from fishfast.fisher.estimate import estimate_fisher
from fishfast.fisher.result import Fisher

__all__ = ["Fisher", "estimate_fisher"]
