"""From a forward and a backward to per-sample squares, for any model.

`scorer` takes one batch through it, with what `eager` does to torch meanwhile. In the forward
`interception` runs the calls where `operands` (what comes from tracked parameters alone) meet the
data, as `rules` say for each function. `audit` walks the graph for whatever else uses a parameter,
which the scorer leaves to autograd. `probe` finds out which sample each of the calls' `rows`
belongs to. In the backward `recorder` makes `uses` of the gradients, `together` sums those of one
weight, and `accumulator` adds their squares to the scores, with `accumulate` (torch) or
`fishfast.kernels` (Triton).
"""
