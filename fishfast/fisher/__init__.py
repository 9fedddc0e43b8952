"""The diagonal Fisher information of a model, exact per sample.

`estimate` is the entry, `run` goes through the batches and `result` is what comes back. What is
differentiated: `objective`, with `losses` of labelled batches, or `outputs` and their `heads` for
exact and sampled labels. Files: `score_files`, and `running` for a run that goes on. `distributed`
sums over processes, `untouched` gives the model back as it was, and `engine` takes one batch
through forward and backward.
"""

from fishfast.fisher.estimate import estimate_fisher
from fishfast.fisher.result import Fisher

__all__ = ["Fisher", "estimate_fisher"]
