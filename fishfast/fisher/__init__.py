"""The diagonal Fisher information of a model, exact per sample.

`estimate_fisher` is the entry; `rules` holds the per-sample gradients of each function,
`interception` catches the calls and audits the rest, `losses` is for batches with labels.
"""

from fishfast.fisher.estimate import Fisher, estimate_fisher

__all__ = ["Fisher", "estimate_fisher"]
