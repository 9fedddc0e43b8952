"""The k largest scores of the whole model, wherever the scores lie.

`plan` checks what was asked for; `radix` is the one algorithm, for scores in memory, in files
(`batches`) and in several processes (`ranks`, `shards`). Its passes run in `cpu` or
`torch_passes`; on a GPU `cuda` does all of it.
"""
