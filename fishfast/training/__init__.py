"""Stage 3: train only the weights of a mask.

`train_only` makes a `handle`; `remask` changes the mask. Where the trained values live is in
`values`, what happens at ``loss.backward()`` in `gradient`.
"""
