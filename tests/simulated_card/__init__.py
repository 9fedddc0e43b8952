"""A card that is not there: the tests marked ``gpu``, on any machine (``--simulated-card``).

`device.cpp` is a "cuda" device of two cards for a torch without CUDA, `torch_cuda` what
`torch.cuda` answers there, `extension` fishfast's own kernels on it, `cannot_run` the tests that
need a real one, and `plugin` puts all of it together. No time measured here means anything.
"""
