"""The optimizers over compact parameters: one launch updates all and writes the weights.

`base` has the torch.optim contract, `sparse_adam` and `sparse_sgd` the arithmetic's numbers.
"""
